import copy
import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from pictures import noise
from PIL import Image
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from torch import nn

from evaluation import faithfulness
from evaluation.faithfulness import (
    Case,
    Interval,
    add_caption,
    beats_controls,
    correlation,
    curve_areas,
    impute,
    localisation,
    randomise_stages,
    rank_pixels,
    relative_change,
    road,
    shift_right,
)
from gradcam import METHODS, OCCLUSION
from model import MEME, NOT_MEME, Classifier, for_inference

SIZE = 64


class Corner(nn.Module):
    """Says meme if the upper left corner is busy."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        contrast = 4 * inputs[:, :, :20, :20].std((1, 2, 3)) - 4
        return torch.stack([contrast, -contrast], 1)


@pytest.fixture
def looks_there(tiny_classifier: Classifier) -> Classifier:
    return dataclasses.replace(tiny_classifier, network=Corner(), temperature=1.0)


@pytest.fixture
def chessboard(looks_there: Classifier) -> torch.Tensor:
    board = Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2, np.full((8, 8), 255)).astype(np.uint8))
    return looks_there.preprocessing(board.convert("RGB"))


def spot(row: int, column: int) -> np.ndarray:
    heat = np.zeros((4, 4), np.float32)
    heat[row, column] = 1
    return heat


def test_the_ranking_goes_from_most_heat_to_least() -> None:
    order = rank_pixels(spot(0, 3), SIZE)
    assert sorted(order) == list(range(SIZE * SIZE))
    rows, columns = np.divmod(order[: SIZE * SIZE // 16], SIZE)
    assert rows.max() <= 24
    assert columns.min() >= 40
    rows, columns = np.divmod(order[-200:], SIZE)  # no heat anywhere: all over the place
    assert rows.std() > 10


def test_a_true_map_deletes_sooner_and_inserts_sooner_than_a_false_one(
    looks_there: Classifier, chessboard: torch.Tensor
) -> None:
    true, false = (curve_areas(looks_there, chessboard, heat, MEME) for heat in (spot(0, 0), spot(3, 3)))
    for substrate in ("blur", "mean colour"):
        assert true[f"deletion, {substrate}"] < 0.2
        assert false[f"deletion, {substrate}"] > 0.8
        assert false[f"insertion, {substrate}"] < true[f"insertion, {substrate}"]
    assert curve_areas(looks_there, chessboard, spot(0, 0), NOT_MEME)["deletion, blur"] == pytest.approx(
        1 - true["deletion, blur"]
    )


def test_road_is_positive_for_a_true_map_and_negative_for_a_false_one(
    looks_there: Classifier, chessboard: torch.Tensor
) -> None:
    assert road(looks_there, chessboard, spot(0, 0), MEME) > 0.1
    assert road(looks_there, chessboard, 1 - spot(0, 0), MEME) < -0.1


def test_the_scores_of_a_picture_are_those_of_its_own_maps(looks_there: Classifier) -> None:
    board = Image.fromarray(np.kron(np.indices((8, 8)).sum(0) % 2, np.full((8, 8), 255)).astype(np.uint8))
    scores = faithfulness.score(looks_there, lambda _, __: spot(0, 0), Case(board.convert("RGB"), MEME))
    assert scores["deletion, blur"] < 0.2
    assert scores["ROAD"] > 0.1
    assert scores["change, 1 pixel"] == scores["change, JPEG 90"] == 0
    changing = faithfulness.score(looks_there, lambda inputs, _: inputs[0].abs().numpy(), Case(noise(60, 60), MEME))
    assert 0 < changing["change, JPEG 90"] != changing["change, 1 pixel"] > 0


@pytest.mark.parametrize("seed", range(6))
def test_captions_are_where_they_are_said_to_be(seed: int) -> None:
    plain = Image.new("RGB", (300, 200), "#808080")
    case = add_caption(plain, random.Random(seed))
    changed = np.asarray(case.picture) != np.asarray(plain)
    rows, columns = np.nonzero(changed.any(2))
    inside = np.zeros(changed.shape[:2], bool)
    for left, top, right, bottom in case.captions:
        inside[round(top * 200) : round(bottom * 200), round(left * 300) : round(right * 300)] = True
    assert inside[rows, columns].all()
    assert 0.02 < inside.mean() <= 0.25
    assert changed.any(2)[inside].mean() > 0.3


def test_pointing_and_energy() -> None:
    case = Case(noise(40, 40), MEME, ((0, 0, 1, 0.25),))
    there, elsewhere = localisation(case, spot(0, 2), SIZE), localisation(case, spot(3, 2), SIZE)
    assert (there["pointing game"], elsewhere["pointing game"]) == (1, 0)
    assert there["energy in captions"] > 0.6
    assert elsewhere["energy in captions"] < 0.01
    assert there["area of captions"] == 0.25
    for top, hit in ((0.62, 1), (0.63, 0)):  # the middle of the third row of four is at 0.625
        assert localisation(Case(noise(40, 40), MEME, ((0, top, 1, 0.9),)), spot(2, 2), SIZE)["pointing game"] == hit
    assert localisation(case, np.ones((4, 4), np.float32), SIZE)["energy in captions"] == pytest.approx(0.25)
    everywhere = Case(noise(40, 40), MEME, ((0, 0, 1, 1),))
    assert localisation(everywhere, np.zeros((4, 4), np.float32), SIZE)["pointing game"] == 0


def test_a_shift_is_by_one_pixel() -> None:
    before = torch.randn(3, 8, 8)
    after = shift_right(before)
    assert torch.equal(after[:, :, 1:], before[:, :, :-1])
    assert torch.equal(after[:, :, 0], before[:, :, 0])


def test_a_change_is_relative_to_the_map_before() -> None:
    before = np.array([[3, 4]], np.float32)
    assert relative_change(before, before) == 0
    assert relative_change(before, np.array([[3, 4.5]], np.float32)) == pytest.approx(0.1)
    assert relative_change(before, np.zeros((1, 2), np.float32)) == 1


def test_flat_maps_are_like_nothing() -> None:
    ramp = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert correlation(ramp, 3 * ramp + 1) == pytest.approx(1)
    assert correlation(ramp, -ramp) == pytest.approx(-1)
    assert math.isnan(correlation(ramp, np.ones((4, 4), np.float32)))


def test_imputed_pixels_are_those_of_pytorch_grad_cam() -> None:
    torch.manual_seed(0)
    inputs, order = torch.randn(3, 24, 24), torch.randperm(24 * 24).numpy()
    for count in (1, 100, 500):
        kept = torch.ones(24 * 24)
        kept[order[:count]] = 0
        reference = NoisyLinearImputer(noise=0)(inputs, kept.view(24, 24))
        assert torch.allclose(impute(inputs, order[:count]), reference, atol=1e-5)


def test_stages_become_random_from_the_last_to_the_first(tiny_network: nn.Module) -> None:
    before = tiny_network.get_parameter("features.conv0.weight").clone()
    names, first_layers = [], []
    for name, network in randomise_stages(tiny_network):
        names.append(name)
        first_layers.append(network.get_parameter("features.conv0.weight"))
    assert names == ["classifier", "denseblock4", "denseblock3", "denseblock2", "denseblock1", "conv0"]
    # The first convolution is folded into its normalisation in every network.
    unchanged = for_inference(tiny_network).get_parameter("features.conv0.weight")
    assert [torch.equal(weights, unchanged) for weights in first_layers] == [True] * 5 + [False]
    assert torch.equal(tiny_network.get_parameter("features.conv0.weight"), before)


def test_better_than_controls_means_apart_from_both() -> None:
    table = {
        "ours": {"deletion, blur": Interval(0.2, 0.1, 0.3), "ROAD": Interval(0.2, 0.1, 0.3)},
        "random": {"deletion, blur": Interval(0.5, 0.4, 0.6), "ROAD": Interval(0.0, -0.1, 0.05)},
        "centred spot": {"deletion, blur": Interval(0.5, 0.31, 0.6), "ROAD": Interval(0.0, -0.1, 0.15)},
    }
    assert beats_controls("ours", "deletion, blur", table)
    assert not beats_controls("ours", "ROAD", table)


def test_scores_do_not_depend_on_the_threads(
    tiny_classifier: Classifier, tiny_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faithfulness, "STEPS", 2)
    monkeypatch.setattr(faithfulness, "ROAD_SHARES", (0.5,))
    plain = copy.deepcopy(tiny_network).requires_grad_()
    cases = [Case(noise(48, 48, seed), MEME) for seed in range(3)]
    table = faithfulness.measure(tiny_classifier, plain, cases)
    explainers = faithfulness.build_explainers(tiny_classifier, plain)
    for method, explainer in explainers.items():
        alone = [faithfulness.score(tiny_classifier, explainer, case) for case in cases]
        for name, interval in table[method].items():
            values = [scores[name] for scores in alone]
            assert interval.value == pytest.approx(np.mean(values), abs=2e-4)  # equal heats may be ranked either way
            assert min(values) - 2e-4 <= interval.low <= interval.high <= max(values) + 2e-4


def test_maps_are_like_those_of_the_same_network_only(
    tiny_classifier: Classifier, tiny_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [Case(noise(64, 64, seed), MEME) for seed in range(4)]
    randomised = faithfulness.measure_sanity(tiny_classifier, tiny_network, cases)
    same = for_inference(tiny_network, torch.float32)
    monkeypatch.setattr(faithfulness, "randomise_stages", lambda _: [("none", same)])
    unchanged = faithfulness.measure_sanity(tiny_classifier, tiny_network, cases)
    for method in METHODS:
        assert unchanged[method]["none"] == pytest.approx(1)
        assert min(value for value in randomised[method].values() if value is not None) < 0.9


def test_the_command_measures_every_method(
    folder: Path,
    tiny_classifier: Classifier,
    tiny_network: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "not_meme" / "four").rename(folder / "not_meme" / "photo__four")
    monkeypatch.setattr(faithfulness, "STEPS", 2)
    monkeypatch.setattr(faithfulness, "ROAD_SHARES", (0.5,))
    monkeypatch.setattr(faithfulness, "plain_network", lambda _: copy.deepcopy(tiny_network).requires_grad_())
    report, plot = folder.parent / "out" / "f.json", folder.parent / "out" / "f.png"
    arguments = (folder, "--pictures", "2", "--json", report, "--plot", plot)
    assert run(monkeypatch, faithfulness.main, tiny_classifier, *arguments) == 0
    written = json.loads(report.read_text())
    assert (written["pictures"], written["drawn_memes"]) == (2, 2)
    assert set(written["scores"]) == {*METHODS, OCCLUSION, "pytorch-grad-cam", "random", "centred spot"}
    assert {tuple(scores) for scores in written["scores"].values()} == {
        (
            *(f"{kind}, {substrate}" for substrate in ("blur", "mean colour") for kind in ("deletion", "insertion")),
            *("ROAD", "change, 1 pixel", "change, JPEG 90"),
            *("pointing game", "energy in captions", "area of captions"),
        )
    }
    assert set(written["randomised"]) == set(METHODS)
    printed = capsys.readouterr().out
    assert printed.count("| LayerCAM |") == 1
    assert "of the drawn memes are called memes" in printed
    assert plot.stat().st_size > 10_000
