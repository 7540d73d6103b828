from collections import defaultdict
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from training_pictures import labelled

from evaluation.dataset import read_folder
from model import CLASSES, MEME, NOT_MEME
from training.stream import NO_LABEL, TrainingStream, balanced_weights, group_names


def test_draws_are_balanced_by_class_group_and_source() -> None:
    pictures = labelled(MEME, "big", 900) + labelled(MEME, "small", 9)
    pictures += labelled(NOT_MEME, "forest", 10_000, "photo") + labelled(NOT_MEME, "cinema", 16, "poster")
    total: dict[str, float] = defaultdict(float)
    for picture, weight in zip(pictures, balanced_weights(pictures), strict=True):
        total[picture.source] += weight
    assert total["big"] + total["small"] == pytest.approx(0.5 * sum(total.values()))
    assert total["big"] / total["small"] == pytest.approx(10)  # square root of 900 / 9
    assert total["forest"] / total["cinema"] == pytest.approx(5)  # fourth root of 10,000 / 16


def test_the_same_step_draws_the_same_pictures(folder: Path) -> None:
    def draw(first_step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stream = TrainingStream(read_folder(folder), {32, 48}, first_step)
        inputs, target = next(iter(DataLoader(stream, 40)))
        return inputs[32], inputs[48], target

    small, large, target = draw(0)
    assert torch.equal(draw(0)[0], small)
    assert not torch.equal(draw(1)[0], small)
    assert 8 < target[:, 0].sum() < 32
    assert small.shape == (40, 3, 32, 32)
    halved = nn.functional.interpolate(large, 32, mode="bilinear", antialias=True)
    assert (halved - small).abs().mean() < 0.1 < (halved - small.roll(1, 0)).abs().mean()  # the same crop


def test_each_picture_comes_with_its_class_and_group(folder: Path) -> None:
    pictures = read_folder(folder)
    groups = group_names(pictures)
    assert groups == ["four", "meme", "poster"]
    _, target = next(iter(DataLoader(TrainingStream(pictures, {32}, 0), 60)))
    seen = {(CLASSES[label], groups[group]) for label, group in target.tolist()}
    assert seen == {(MEME, "meme"), (NOT_MEME, "poster"), (NOT_MEME, "four")}


def test_every_second_picture_may_come_without_a_label(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (1, 2, 3)).save(tmp_path / "unlabelled.png")
    stream = TrainingStream(read_folder(folder), {32}, 0, unlabelled=[tmp_path / "unlabelled.png"])
    inputs, target = next(iter(DataLoader(stream, 200)))
    assert (target[1::2] == NO_LABEL).all()
    assert (target[::2] >= 0).all()
    flat = inputs[32].flatten(2).std(2).amax(1) < 0.05  # of one colour, but for JPEG
    assert not flat[::2].any()
    assert 5 < flat[1::2].sum() < 30


def test_two_workers_draw_different_pictures(folder: Path) -> None:
    stream = TrainingStream(read_folder(folder), {32}, 0)
    batches = iter(DataLoader(stream, 4, num_workers=2))
    inputs = [next(batches)[0][32] for _ in range(4)]
    assert not any(torch.equal(one, other) for one, other in combinations(inputs, 2))


def test_a_bad_picture_is_named_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "meme" / "one" / "0.png").write_bytes(b"no picture")
    stream = iter(TrainingStream(read_folder(folder), {32}, 0))
    for _ in range(60):
        next(stream)
    assert "0.png: This file is not a picture" in capsys.readouterr().err
