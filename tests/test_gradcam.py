import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from gradcam import FADE, JET, explain, forward_with_feature_map, grad_cam, legend, overlay
from model import CLASSES, Classifier, build_network


def hook_count(network: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in network.modules() for kind in kinds)


@pytest.mark.parametrize("index", [0, 1])
def test_grad_cam_is_classic_cam_on_densenet121(index: int) -> None:
    """For global average pooling and one linear layer the two are the same (section 3 of the paper)."""
    torch.manual_seed(0)
    network = build_network().eval().requires_grad_(False)
    inputs = torch.randn(2, 3, 128, 128)
    ours = grad_cam(*forward_with_feature_map(network, inputs), index)
    features = network.get_submodule("features")(inputs).relu()  # (2, 1024, 4, 4)
    weights = network.get_parameter("classifier.weight")[index]
    classic = torch.einsum("k,nkhw->nhw", weights, features).relu() / 16
    assert classic.max() > 0
    torch.testing.assert_close(ours, classic, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("index", [0, 1])
def test_grad_cam_by_finite_differences(index: int, tiny_classifier: Classifier) -> None:
    network = copy.deepcopy(tiny_classifier.network).double()
    inputs = torch.randn(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    feature_map = network.get_submodule("features")(inputs).relu()  # (1, K, 2, 2)
    tail = torch.nn.Sequential(*list(network.children())[2:])
    gradients = torch.empty_like(feature_map)
    for position in np.ndindex(*feature_map.shape):
        step = torch.zeros_like(feature_map)
        step[position] = 1e-4
        up, down = tail(feature_map + step), tail(feature_map - step)
        gradients[position] = (up - down)[0, index] / 2e-4
    expected = (gradients.mean((2, 3), keepdim=True) * feature_map).sum(1).relu()
    ours = grad_cam(*forward_with_feature_map(network, inputs), index)
    torch.testing.assert_close(ours, expected, atol=1e-8, rtol=1e-6)


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
    """The mean cell's evidence for both classes adds up to the logits, less their bias."""
    picture = noise(64, 64)
    logits, feature_map = forward_with_feature_map(tiny_classifier.network, tiny_classifier.preprocess([picture]))
    weights = tiny_classifier.network.get_parameter("classifier.weight")
    bias = tiny_classifier.network.get_parameter("classifier.bias")
    cells = torch.einsum("ck,nkhw->nchw", weights, feature_map.detach())
    torch.testing.assert_close(cells.mean((2, 3)) + bias, logits.detach())
    (explanation,) = explain(tiny_classifier, [picture])
    for index, name in enumerate(CLASSES):
        expected = (cells[0, index] / tiny_classifier.evidence_scale).clamp(0, 1)
        np.testing.assert_allclose(explanation.heat[name], expected, atol=1e-6)


def test_visitors_at_once_get_their_own_heatmaps(tiny_classifier: Classifier, pictures: list[Image.Image]) -> None:
    alone = [explain(tiny_classifier, [picture])[0] for picture in pictures]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda picture: explain(tiny_classifier, [picture])[0], pictures * 10))
    for got, expected in zip(at_once, alone * 10, strict=True):
        assert got.prediction == expected.prediction
        for name in CLASSES:
            np.testing.assert_array_equal(got.heat[name], expected.heat[name])


def test_visitors_at_once_on_the_shipped_network(classifier: Classifier) -> None:
    pictures = [noise(200, 150, seed) for seed in range(20)]
    alone = [explain(classifier, [picture])[0] for picture in pictures]
    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(lambda picture: explain(classifier, [picture])[0], pictures))
    for got, expected in zip(at_once, alone, strict=True):
        for name in CLASSES:
            np.testing.assert_array_equal(got.heat[name], expected.heat[name])


def test_nothing_is_left_on_the_network(tiny_classifier: Classifier) -> None:
    network = tiny_classifier.network
    modules = list(network.modules())
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    explain(tiny_classifier, [noise(64, 64)])
    with pytest.raises(RuntimeError):
        forward_with_feature_map(network, torch.zeros(1, 5, 64, 64))  # five channels
    assert hook_count(network) == 0
    assert all(one is other for one, other in zip(network.modules(), modules, strict=True))
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_nothing_to_see_leaves_the_picture_as_it_is() -> None:
    picture = noise(90, 60)
    assert overlay(picture, np.zeros((7, 7), np.float32), opacity=1).tobytes() == picture.tobytes()
    assert overlay(picture, np.ones((7, 7), np.float32), opacity=0).tobytes() == picture.tobytes()


def test_full_heat_at_full_opacity_is_jets_red_end() -> None:
    painted = np.asarray(overlay(noise(90, 60), np.ones((7, 7), np.float32), opacity=1))
    assert (painted == JET[255]).all()


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


def test_more_opacity_shows_more_heat() -> None:
    picture, heat = noise(60, 60), np.full((7, 7), 0.8, np.float32)
    changes = [
        np.abs(np.asarray(overlay(picture, heat, opacity), int) - np.asarray(picture, int)).mean()
        for opacity in (0.2, 0.5, 0.9)
    ]
    assert changes == sorted(changes)
    assert len(set(changes)) == 3


def test_the_legend_runs_from_nothing_to_red() -> None:
    colours = np.asarray(legend())[0].astype(int)
    assert tuple(colours[0]) == (128, 128, 128)
    assert tuple(colours[-1]) == tuple(JET[255])
    weak = colours[int(FADE * len(colours))]
    assert weak[2] > weak[0]  # blue before red
