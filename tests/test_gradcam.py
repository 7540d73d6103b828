import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import captum
import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pictures import ROOT, noise
from PIL import Image, ImageOps
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from gradcam import (
    COLOUR_MAPS,
    FADE_BELOW,
    LAST_LAYER,
    MASKED_SHARE,
    METHODS,
    OCCLUSION,
    check_faithfulness,
    encode_png,
    explain,
    explain_by_occlusion,
    forward_with_feature_map,
    legend,
    overlay,
    resize_heatmap,
    top_and_bottom_masks,
)
from images import find_pictures, open_picture
from model import CLASSES, DEFAULT_CHECKPOINT, MEME, NOT_MEME, Classifier, build_network, for_inference


def hook_count(network: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in network.modules() for kind in kinds)


def compute_maps(network: nn.Module, inputs: torch.Tensor, method: str, index: int) -> torch.Tensor:
    logits, feature_map = forward_with_feature_map(network, inputs, METHODS[method].layer)
    (gradients,) = torch.autograd.grad(logits[:, index].sum(), feature_map)
    return METHODS[method].formula(feature_map.detach(), gradients)


@pytest.fixture(scope="module")
def densenet() -> nn.Module:
    """DenseNet121 with seeded weights. Large classifier weights keep Grad-CAM++ above the epsilon of its reference."""
    torch.manual_seed(0)
    network = build_network().eval().requires_grad_(False)
    network.get_parameter("classifier.weight").mul_(1000)
    return network


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ("Grad-CAM", pytorch_grad_cam.GradCAM),
        ("Grad-CAM++", pytorch_grad_cam.GradCAMPlusPlus),
        ("HiResCAM", pytorch_grad_cam.HiResCAM),
        ("LayerCAM", pytorch_grad_cam.LayerCAM),
    ],
)
def test_every_method_equals_pytorch_grad_cam(method: str, reference: Any, index: int, densenet: nn.Module) -> None:
    """Compares the maps of that library before it rescales each one to its own range."""
    inputs = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    name = METHODS[method].layer
    network = copy.deepcopy(densenet).requires_grad_(True)  # that library needs parameters with gradients
    layer = network.get_submodule(name if name == LAST_LAYER else f"features.{name}")
    targets = [ClassifierOutputTarget(index)] * len(inputs)
    with reference(network, [layer]) as cam:
        cam.forward(inputs, targets)
        recorded = cam.activations_and_grads
        theirs = cam.get_cam_image(
            inputs, layer, targets, recorded.activations[0].numpy(), recorded.gradients[0].numpy(), eigen_smooth=False
        ).clip(0)
    assert theirs.max() > 0
    ours = compute_maps(densenet, inputs, method, index).numpy()
    np.testing.assert_allclose(ours / theirs.max(), theirs / theirs.max(), atol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_grad_cam_is_classic_cam_on_densenet121(index: int, densenet: nn.Module) -> None:
    """With global average pooling and one linear layer the two are equal (section 3 of the paper)."""
    inputs = torch.randn(2, 3, 128, 128)
    features = densenet.get_submodule("features")(inputs).relu()  # (2, 1024, 4, 4)
    weights = densenet.get_parameter("classifier.weight")[index]
    classic = torch.einsum("k,nkhw->nhw", weights, features).relu() / 16
    assert classic.max() > 0
    torch.testing.assert_close(compute_maps(densenet, inputs, "Grad-CAM", index), classic, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("method", ["Grad-CAM", "HiResCAM"])
def test_gradients_by_finite_differences(method: str, index: int, tiny_network: nn.Module) -> None:
    network = copy.deepcopy(tiny_network).double()
    inputs = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stages = [*network.get_submodule("features").named_children(), *list(network.named_children())[1:]]
    cut = [name for name, _ in stages].index(METHODS[method].layer) + 1
    feature_map = torch.nn.Sequential(*(stage for _, stage in stages[:cut]))(inputs)
    tail = torch.nn.Sequential(*(stage for _, stage in stages[cut:]))
    gradients = torch.empty_like(feature_map)
    for position in np.ndindex(*feature_map.shape):
        step = torch.zeros_like(feature_map)
        step[position] = 1e-6
        up, down = tail(feature_map + step), tail(feature_map - step)
        gradients[position] = (up - down)[0, index] / 2e-6
    expected = METHODS[method].formula(feature_map, gradients)
    torch.testing.assert_close(compute_maps(network, inputs, method, index), expected, atol=1e-8, rtol=1e-5)


def test_occlusion_equals_captum(tiny_classifier: Classifier) -> None:
    inputs = tiny_classifier.preprocess([noise(64, 64, 5)])

    def log_odds(batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = tiny_classifier.network(batch)
        return (logits[:, 0] - logits[:, 1]) / tiny_classifier.temperature

    expected = captum.attr.Occlusion(log_odds).attribute(inputs, sliding_window_shapes=(3, 16, 16), strides=(3, 8, 8))
    expected = expected[0, 0, 4::8, 4::8].numpy()  # (8, 8), one value per cell
    heat = explain_by_occlusion(tiny_classifier, inputs[0]).heat
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(heat[MEME], expected.clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(heat[NOT_MEME], (-expected).clip(0, 1), atol=1e-6)


def test_one_forward_pass_gives_the_prediction_and_both_maps(
    tiny_classifier: Classifier, pictures: list[Image.Image]
) -> None:
    passes = []
    first_layer = tiny_classifier.network.get_submodule("features.conv0")
    handle = first_layer.register_forward_hook(lambda *_: passes.append(1))
    try:
        explanations = explain(tiny_classifier, pictures)
    finally:
        handle.remove()
    assert len(passes) == 1
    for explanation, prediction in zip(explanations, tiny_classifier.predict(pictures), strict=True):
        assert explanation.prediction.verdict == prediction.verdict
        assert explanation.prediction.meme_probability == pytest.approx(prediction.meme_probability, abs=1e-6)
    for explanation in explanations:
        assert set(explanation.heat) == set(CLASSES)
        for heat in explanation.heat.values():
            assert heat.shape == (2, 2)
            assert heat.dtype == np.float32
            assert heat.min() >= 0
            assert heat.max() <= 1


def test_heat_is_on_one_scale_for_all_pictures(tiny_classifier: Classifier) -> None:
    """The mean of the cells' evidence, plus the bias, equals the logits."""
    picture = noise(64, 64)
    logits, feature_map = forward_with_feature_map(tiny_classifier.network, tiny_classifier.preprocess([picture]))
    weights = tiny_classifier.network.get_parameter("classifier.weight")
    bias = tiny_classifier.network.get_parameter("classifier.bias")
    cells = torch.einsum("ck,nkhw->nchw", weights, feature_map.detach())
    torch.testing.assert_close(cells.mean((2, 3)) + bias, logits.detach())
    (explanation,) = explain(tiny_classifier, [picture])
    for index, name in enumerate(CLASSES):
        expected = (cells[0, index] / tiny_classifier.evidence_scales["Grad-CAM"]).clamp(0, 1)
        np.testing.assert_allclose(explanation.heat[name], expected, atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS, OCCLUSION])
def test_concurrent_sessions_get_their_own_heatmaps(
    method: str, tiny_classifier: Classifier, pictures: list[Image.Image]
) -> None:
    alone = [explain(tiny_classifier, [picture], method)[0] for picture in pictures]
    assert any(explanation.heat[MEME].any() for explanation in alone)
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda picture: explain(tiny_classifier, [picture], method)[0], pictures * 10))
    for got, expected in zip(at_once, alone * 10, strict=True):
        assert got.prediction == expected.prediction
        for name in CLASSES:
            np.testing.assert_array_equal(got.heat[name], expected.heat[name])


@pytest.mark.parametrize("method", METHODS)
def test_maps_match_those_of_full_precision(method: str, classifier: Classifier) -> None:
    """On pictures of both classes, within 0.05 of the full scale."""
    checkpoint = torch.load(DEFAULT_CHECKPOINT, weights_only=True)
    exact = build_network()
    exact.load_state_dict(checkpoint["state_dict"])
    precise = dataclasses.replace(classifier, network=for_inference(exact, torch.float32))
    examples = [open_picture(path) for path in find_pictures(ROOT / "examples")]
    for ours, theirs in zip(explain(classifier, examples, method), explain(precise, examples, method), strict=True):
        for name in CLASSES:
            np.testing.assert_allclose(ours.heat[name], theirs.heat[name], atol=0.05)
        assert ours.prediction.meme_probability == pytest.approx(theirs.prediction.meme_probability, abs=0.01)


def test_answers_do_not_depend_on_the_batch(classifier: Classifier) -> None:
    """The page classifies one picture at a time, the command line sixteen."""
    pictures = [noise(200, 150, seed) for seed in range(16)]
    alone = [explain(classifier, [picture])[0] for picture in pictures]
    for one, batched in zip(alone, explain(classifier, pictures), strict=True):
        assert one.prediction.meme_probability == pytest.approx(batched.prediction.meme_probability, abs=1e-6)
        for name in CLASSES:
            np.testing.assert_allclose(one.heat[name], batched.heat[name], atol=1e-5)


def test_concurrent_sessions_on_the_shipped_network(classifier: Classifier) -> None:
    pictures = [noise(200, 150, seed) for seed in range(20)]
    alone = [explain(classifier, [picture])[0] for picture in pictures]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda picture: explain(classifier, [picture])[0], pictures))
    for got, expected in zip(at_once, alone, strict=True):
        for name in CLASSES:
            np.testing.assert_array_equal(got.heat[name], expected.heat[name])


@pytest.mark.parametrize("method", METHODS)
def test_explaining_leaves_the_network_unchanged(method: str, tiny_classifier: Classifier) -> None:
    network = tiny_classifier.network
    modules = list(network.modules())
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    explain(tiny_classifier, [noise(64, 64)], method)
    with pytest.raises(RuntimeError):
        forward_with_feature_map(network, torch.zeros(1, 5, 64, 64), METHODS[method].layer)  # five channels
    assert hook_count(network) == 0
    assert all(one is other for one, other in zip(network.modules(), modules, strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_no_heat_or_no_opacity_leaves_the_picture_unchanged() -> None:
    picture = noise(90, 60)
    assert overlay(picture, np.zeros((7, 7), np.float32), opacity=1).tobytes() == picture.tobytes()
    assert overlay(picture, np.ones((7, 7), np.float32), opacity=0).tobytes() == picture.tobytes()


def test_full_heat_at_full_opacity_is_the_red_end_of_jet() -> None:
    painted = np.asarray(overlay(noise(90, 60), np.ones((7, 7), np.float32), opacity=1))
    assert (painted == COLOUR_MAPS["jet"][255]).all()


@pytest.mark.parametrize(("width", "height"), [(70, 70), (210, 70), (70, 350)])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (6, 6)])
def test_heat_lies_on_the_part_that_the_network_saw(width: int, height: int, row: int, column: int) -> None:
    heat = np.zeros((7, 7), np.float32)
    heat[row, column] = 1
    grey = Image.new("RGB", (width, height), "grey")
    painted = np.asarray(overlay(grey, heat, opacity=1)).astype(int)
    changed = np.abs(painted - np.asarray(grey)).sum(2) > 30
    rows, columns = np.nonzero(changed)
    top, left = row * height / 7, column * width / 7
    assert changed[int(top + height / 14), int(left + width / 14)]
    # Cubic interpolation reaches about one cell to each side.
    assert rows.min() >= top - height / 7
    assert rows.max() <= top + 2 * height / 7
    assert columns.min() >= left - width / 7
    assert columns.max() <= left + 2 * width / 7


@pytest.mark.parametrize("method", [*METHODS, OCCLUSION])
def test_a_border_changes_neither_answer_nor_heatmap(method: str, tiny_classifier: Classifier) -> None:
    picture = noise(320, 320, 3)
    whole = ImageOps.expand(picture, (0, 160, 0, 160), "black")
    alone, bordered = (explain(tiny_classifier, [one], method)[0] for one in (picture, whole))
    assert bordered.prediction == alone.prediction
    assert any(heat.any() for heat in alone.heat.values())
    for name, heat in alone.heat.items():
        padded = resize_heatmap(bordered.heat[name], whole.size)
        assert padded[:150].max() == padded[490:].max() == 0
        assert np.abs(padded[160:480] - resize_heatmap(heat, picture.size))[8:-8].max() <= 0.1 * heat.max()


def test_a_large_picture_is_painted_without_seams() -> None:
    heat = np.random.default_rng(0).random((5, 5), np.float32)
    grey = Image.new("RGB", (300, 1100), "grey")
    painted = np.asarray(overlay(grey, heat, opacity=1), int)
    expected = COLOUR_MAPS["jet"][(resize_heatmap(heat, grey.size) * 255).astype(np.uint8)]
    fully_painted = resize_heatmap(heat, grey.size) > FADE_BELOW
    assert fully_painted.sum() > 100_000
    assert np.abs(painted - expected)[fully_painted].max() <= 4  # one step of the colour map


def test_more_opacity_shows_more_heat() -> None:
    picture, heat = noise(60, 60), np.full((7, 7), 0.8, np.float32)
    changes = [
        np.abs(np.asarray(overlay(picture, heat, opacity), int) - np.asarray(picture, int)).mean()
        for opacity in (0.2, 0.5, 0.9)
    ]
    assert changes == sorted(changes)
    assert len(set(changes)) == 3


def test_viridis_increases_in_brightness() -> None:
    """Monotonic brightness keeps a colour map readable for the colour-blind and in greyscale."""
    brightness = COLOUR_MAPS["viridis"] @ np.array([0.2126, 0.7152, 0.0722])  # ITU-R BT.709
    assert (np.diff(brightness) > -1).all()
    assert brightness[-1] - brightness[0] > 150
    picture, heat = noise(60, 60), np.ones((7, 7), np.float32)
    painted = np.asarray(overlay(picture, heat, opacity=1, colour_map="viridis"))
    assert (painted == COLOUR_MAPS["viridis"][255]).all()


@pytest.mark.parametrize(("width", "height"), [(100, 100), (301, 77)])
def test_masks_cover_the_strongest_and_the_weakest_part(width: int, height: int) -> None:
    heat = np.zeros((5, 5), np.float32)
    heat[4, :] = 1  # the lowest row is a fifth of the picture
    *masks, share = top_and_bottom_masks(heat, (width, height))
    strongest, weakest = (np.asarray(mask) == 255 for mask in masks)
    assert strongest.mean() == pytest.approx(MASKED_SHARE, abs=0.001)
    assert share == pytest.approx(MASKED_SHARE, abs=0.001)
    assert np.nonzero(strongest)[0].min() >= height * 0.75
    assert not weakest[int(height * 0.8) :].any()


def test_both_masks_shrink_to_the_part_with_heat() -> None:
    heat = np.zeros((5, 5), np.float32)
    heat[2, 2] = 1
    *masks, share = top_and_bottom_masks(heat, (100, 100))
    strongest, weakest = (np.asarray(mask) for mask in masks)
    assert 0.03 < share < MASKED_SHARE
    assert np.count_nonzero(strongest) == np.count_nonzero(weakest) == round(share * 10_000)
    # Spread over the picture, not only at the top, where captions are.
    assert np.nonzero(weakest)[0].mean() == pytest.approx(50, abs=5)
    assert top_and_bottom_masks(np.zeros((5, 5), np.float32), (100, 100))[2] == 0


def test_masking_the_evidence_changes_the_answer(tiny_classifier: Classifier) -> None:
    """A network that measures the contrast of one corner, with a faithful and a wrong heatmap."""

    class Corner(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            contrast = 4 * inputs[:, :, :20, :20].std((1, 2, 3)) - 4
            return torch.stack([contrast, -contrast], 1)

    corner_classifier = dataclasses.replace(tiny_classifier, network=Corner(), temperature=1.0)
    picture = Image.fromarray(np.kron(np.indices((5, 10)).sum(0) % 2, np.full((20, 20), 255)).astype(np.uint8))
    picture = picture.convert("RGB")  # a chessboard
    (before,) = corner_classifier.predict([picture])
    right, wrong = np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)
    right[0, 0] = wrong[3, 3] = 1
    faithful, unfaithful = (check_faithfulness(corner_classifier, picture, heat) for heat in (right, wrong))
    assert before.meme_probability > 0.95
    assert max(faithful.blurred, faithful.mean_colour) < 0.3
    assert faithful.control == pytest.approx(before.meme_probability)
    assert min(unfaithful.blurred, unfaithful.mean_colour) == pytest.approx(before.meme_probability)
    hidden, whole = np.asarray(faithful.masked_picture)[:20, :40], np.asarray(picture)[:20, :40]
    assert hidden.std() < whole.std() / 4


@pytest.mark.parametrize("border", [(0, 300, 0, 300), (80, 0, 80, 0), (0, 40, 0, 0)])
def test_the_faithfulness_check_leaves_a_border_alone(
    classifier: Classifier, border: tuple[int, int, int, int]
) -> None:
    """A border, which is not classified, does not change the result of the check."""
    picture = open_picture(ROOT / "examples" / "cat_meme.jpg")
    bordered = ImageOps.expand(picture, border, "black")
    alone, inside = (
        check_faithfulness(classifier, one, explain(classifier, [one])[0].heat[MEME]) for one in (picture, bordered)
    )
    assert inside.masked_share == pytest.approx(alone.masked_share, abs=0.01)
    for name in ("blurred", "mean_colour", "control"):
        assert getattr(inside, name) == pytest.approx(getattr(alone, name), abs=0.1)
    assert inside.masked_picture.size == bordered.size
    assert np.asarray(inside.masked_picture)[: border[1] * 9 // 10].max(initial=0) == 0


def test_the_legend_runs_from_no_colour_to_red() -> None:
    colours = np.asarray(legend())[0].astype(int)
    assert tuple(colours[0]) == (128, 128, 128)
    assert tuple(colours[-1]) == tuple(COLOUR_MAPS["jet"][255])
    weak = colours[int(FADE_BELOW * len(colours))]
    assert weak[2] > weak[0]  # blue before red


def test_the_text_chunks_of_a_png_name_its_origin(tiny_classifier: Classifier) -> None:
    picture = noise(90, 60)
    (prediction,) = tiny_classifier.predict([picture])
    named = dataclasses.replace(tiny_classifier, sha256="abc")
    with Image.open(BytesIO(encode_png(picture, named, prediction, NOT_MEME, "LayerCAM"))) as read:
        assert read.text == {  # type: ignore[attr-defined]
            "Software": "Meme Classifier",
            "Checkpoint SHA-256": "abc",
            "Method": "LayerCAM",
            "Evidence for": "not_meme",
            "Probability of meme": f"{prediction.meme_probability:.4f}",
        }
        assert read.convert("RGB").tobytes() == picture.tobytes()
