import math
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from pictures import noise
from torch import nn
from torch.utils.data import DataLoader

import train
from evaluate import LabelledPicture, read_folder
from model import MEME, NOT_MEME, Classifier, Preprocessing, build_network
from train import Stage, TrainingStream, balanced_weights, fit_not_sure, fit_temperature, fit_threshold, hold_out


def labelled(label: str, source: str, count: int, group: str = "group") -> list[LabelledPicture]:
    return [LabelledPicture(Path(label) / source / str(n), label, group, source) for n in range(count)]


def test_draws_are_balanced_by_class_group_and_source() -> None:
    pictures = labelled(MEME, "big", 900) + labelled(MEME, "small", 9)
    pictures += labelled(NOT_MEME, "forest", 250_000, "photo") + labelled(NOT_MEME, "cinema", 400, "poster")
    total: dict[str, float] = defaultdict(float)
    for picture, weight in zip(pictures, balanced_weights(pictures), strict=True):
        total[picture.source] += weight
    assert total["big"] + total["small"] == pytest.approx(0.5 * sum(total.values()))
    assert total["big"] / total["small"] == pytest.approx(10)  # the root of 900 / 9
    assert total["forest"] / total["cinema"] == pytest.approx(5)  # the fourth root of 250,000 / 400


def test_the_same_step_draws_the_same_pictures(folder: Path) -> None:
    def draw(first_step: int) -> tuple[torch.Tensor, list[int]]:
        stream = iter(TrainingStream(read_folder(folder), Preprocessing(32), first_step))
        inputs, labels = zip(*(next(stream) for _ in range(40)), strict=True)
        return torch.stack(inputs), list(labels)

    first, labels = draw(0)
    assert torch.equal(draw(0)[0], first)
    assert not torch.equal(draw(1)[0], first)
    assert 8 < sum(labels) < 32
    assert first.shape == (40, 3, 32, 32)


def test_two_workers_draw_different_pictures(folder: Path) -> None:
    stream = TrainingStream(read_folder(folder), Preprocessing(32), 0)
    batches = iter(DataLoader(stream, 4, num_workers=2))
    inputs = [next(batches)[0] for _ in range(4)]
    assert not any(torch.equal(one, other) for one, other in combinations(inputs, 2))


def test_training_goes_past_a_bad_picture_and_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "meme" / "one" / "0.png").write_bytes(b"no picture")
    stream = iter(TrainingStream(read_folder(folder), Preprocessing(32), 0))
    for _ in range(60):
        next(stream)
    assert "0.png: This file is not a picture" in capsys.readouterr().err


def test_the_temperature_undoes_overconfidence() -> None:
    draw = np.random.default_rng(0)
    margin = draw.normal(0, 2, 20_000)
    is_meme = draw.random(20_000) < 1 / (1 + np.exp(-margin))  # calibrated
    assert fit_temperature(margin, is_meme) == pytest.approx(1, rel=0.05)
    assert fit_temperature(3 * margin, is_meme) == pytest.approx(3, rel=0.05)


def test_the_threshold_is_the_lowest_of_the_precision_that_is_aimed_at() -> None:
    probability = np.linspace(0, 1, 1001)
    is_meme = np.random.default_rng(0).random(1001) < probability
    threshold = fit_threshold(probability, is_meme)
    assert is_meme[probability >= threshold].mean() >= train.AIM_PRECISION
    assert is_meme[probability >= threshold - 0.005].mean() < train.AIM_PRECISION
    assert fit_threshold(probability, probability > 0.97) == pytest.approx(0.95)  # never reached


def test_the_band_of_doubt_is_as_narrow_as_the_aim_allows() -> None:
    draw = np.random.default_rng(1)
    probability = draw.beta(0.2, 0.2, 5000)
    is_meme = draw.random(5000) < probability
    low, high = fit_not_sure(probability, is_meme, 0.5)
    answered = (probability <= low) | (probability >= high)
    assert low < 0.5 < high
    assert answered.mean() >= 1 - train.MOST_UNANSWERED
    # Every answer between 0.3 and 0.7 is wrong, every other right; they are 5 % of all.
    probability = np.concatenate([np.linspace(0.3, 0.7, 51), np.repeat([0.05, 0.95], 500)])
    is_meme = np.concatenate([probability[:51] < 0.5, probability[51:] > 0.5])
    low, high = fit_not_sure(probability, is_meme, 0.5)
    assert 0.28 < low < 0.4
    assert 0.6 < high < 0.72
    certain = np.where(is_meme, 0.99, 0.01)
    assert fit_not_sure(certain, is_meme, 0.5) == (0.5, 0.5)


def test_whole_sources_are_held_out() -> None:
    pictures = [p for n in range(12) for p in labelled(MEME, f"m{n}", 10) + labelled(NOT_MEME, f"n{n}", 10)]
    kept, aside = hold_out(pictures)
    assert len(kept) + len(aside) == len(pictures)
    assert not {p.source for p in kept} & {p.source for p in aside}
    assert all(0.05 < count / 120 < 0.25 for count in Counter(p.label for p in aside).values())


def test_a_large_source_is_not_taken_whole() -> None:
    pictures = labelled(MEME, "big", 900) + labelled(MEME, "small", 100)
    pictures += labelled(NOT_MEME, "half", 500) + labelled(NOT_MEME, "other half", 500)
    kept, aside = hold_out(pictures)
    assert {p.source for p in aside if p.label == MEME} == {"small"}
    assert Counter(p.label for p in aside) == {MEME: 100, NOT_MEME: 100}
    assert len(kept) == 1800


def test_a_single_source_is_split() -> None:
    kept, aside = hold_out(labelled(MEME, "m", 20) + labelled(NOT_MEME, "n", 20))
    assert Counter(p.label for p in aside) == {MEME: 2, NOT_MEME: 2}
    assert len(kept) == 36


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [train.schedule(n / 100) for n in range(101)]
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[peak] == pytest.approx(1, abs=0.01)
    assert rates[-1] == pytest.approx(0, abs=1e-9)


def test_centring_changes_no_probability() -> None:
    network = nn.Sequential(nn.Linear(1, 1))
    network.add_module("classifier", nn.Linear(1, 2).requires_grad_(False))
    inputs = torch.randn(5, 1)
    before = network(inputs).detach()
    train.centre_classifier(network)
    after = network(inputs).detach()
    torch.testing.assert_close(after.softmax(1), before.softmax(1))
    torch.testing.assert_close(after[:, 0], -after[:, 1])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of two steps of four pictures each, saved after every step."""
    monkeypatch.setattr(train, "STAGES", (Stage(32, 8), Stage(48, 8)))
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "INPUT_SIZE", 48)
    monkeypatch.setattr(train, "SAVE_EVERY", -1)


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_resumes_and_gives_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = tmp_path / "init.pth"
    torch.manual_seed(0)
    weights = build_network().state_dict()
    torch.save({name: tensor.half() for name, tensor in weights.items() if "classifier" not in name}, init)
    out = tmp_path / "out.pth"
    whole_schedule = train.schedule
    calls: list[float] = []

    def interrupted(progress: float) -> float:
        calls.append(progress)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole_schedule(progress)

    monkeypatch.setattr(train, "schedule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, train.main, None, folder, "--out", out, "--init", init)
    assert not out.exists()
    assert run(monkeypatch, train.main, None, folder, "--out", out, "--resume") == 0
    assert calls == [0, 0.25, 0.5, 0.75, 0.75]
    assert "validation pictures right" in capsys.readouterr().out

    classifier = Classifier.load(out)
    assert classifier.preprocessing.input_size == 48
    assert classifier.about["stages"] == [{"input_size": 32, "pictures": 8}, {"input_size": 48, "pictures": 8}]
    assert 0 <= classifier.not_sure[0] <= classifier.threshold <= classifier.not_sure[1] <= 1
    (prediction,) = classifier.predict([noise(60, 40)])
    assert math.isfinite(prediction.meme_probability)


@pytest.mark.usefixtures("quick")
def test_a_run_does_not_resume_on_other_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.pth"
    assert run(monkeypatch, train.main, None, folder, "--out", out, "--val", folder) == 0
    (folder / "meme" / "one" / "0.png").unlink()
    with pytest.raises(SystemExit, match="is of a run on other pictures"):
        run(monkeypatch, train.main, None, folder, "--out", out, "--val", folder, "--resume")


@pytest.mark.parametrize("weights", [{"fc.weight": torch.zeros(2)}, torch.zeros(3)])
def test_foreign_initial_weights_are_refused_in_a_sentence(weights: object, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(weights, path)
    with pytest.raises(SystemExit, match="DenseNet121's weights"):
        train.load_initial_weights(build_network(), path)


def test_folders_without_both_classes_are_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, train.main, None, tmp_path)
    assert stop.value.code == 2
    assert "there must be pictures below both" in capsys.readouterr().err
