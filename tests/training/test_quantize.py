"""Quantising to 8 bits, on the tiny network and on the shipped one."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import ROOT
from PIL import Image

import engine
from engine import INT8, OpenVINONetwork
from evaluation.dataset import LabelledPicture, read_folder
from images import find_pictures, open_picture
from model import DEFAULT_CHECKPOINT, NOT_MEME, Classifier
from training import quantize


@pytest.fixture
def quantized(
    tiny_checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, str]:
    """The tiny checkpoint after the command, and what the command said."""
    monkeypatch.setattr(quantize, "CALIBRATION_PICTURES", 8)
    monkeypatch.setattr(sys, "argv", ["quantize", str(folder), "--checkpoint", str(tiny_checkpoint)])
    assert quantize.main() == 0
    return tiny_checkpoint, capsys.readouterr().out


def test_the_command_makes_an_8_bit_network_with_its_measured_error(quantized: tuple[Path, str], folder: Path) -> None:
    checkpoint, said = quantized
    exact = Classifier.load(checkpoint, torch.float32)
    converted, max_shift = engine.read_converted(engine.quantized_path(checkpoint), exact.sha256)
    constants = [node for node in converted.get_ops() if node.get_type_name() == "Constant"]
    assert "i8" in {constant.get_output_element_type(0).get_type_name() for constant in constants}
    fast = engine.load_fastest(checkpoint, INT8)
    assert isinstance(fast.network, OpenVINONetwork)
    assert fast.rounding == max(max_shift, 0.015)
    _, others = quantize.split_by_source(read_folder(folder), 8, 1000)
    inputs = exact.preprocess([open_picture(picture.path) for picture in others])
    shifts = [
        abs(ours.meme_probability - theirs.meme_probability)
        for ours, theirs in zip(
            fast.read_logits(fast.network(inputs)), exact.read_logits(exact.network(inputs)), strict=True
        )
    ]
    assert 0 < max_shift < 0.1
    assert max_shift == pytest.approx(max(shifts), abs=1e-4)
    assert f"on 8 other pictures, probabilities move by {np.mean(shifts):.4f} on average and {max_shift:.4f}" in said


def test_every_source_gives_its_share_to_both_lists() -> None:
    pictures = [
        LabelledPicture(Path(f"{source}-{number}.jpg"), NOT_MEME, "photo", source)
        for source, count in {"large": 600, "middle": 300, "small": 100}.items()
        for number in range(count)
    ]
    calibration, test = quantize.split_by_source(pictures, 100, 300)
    assert not {picture.path for picture in calibration} & {picture.path for picture in test}
    for chosen, size in ((calibration, 100), (test, 300)):
        assert len(chosen) == size
        for source, part in {"large": 0.6, "middle": 0.3, "small": 0.1}.items():
            assert sum(picture.source == source for picture in chosen) == pytest.approx(part * size, abs=2)
    assert quantize.split_by_source(pictures, 100, 300) == (calibration, test)


def test_too_few_pictures_are_refused(
    tiny_checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize", str(folder), "--checkpoint", str(tiny_checkpoint)])
    with pytest.raises(SystemExit) as exit_:
        quantize.main()
    assert exit_.value.code == 2
    assert "must hold more than 300 pictures" in capsys.readouterr().err
    assert not engine.quantized_path(tiny_checkpoint).exists()


def test_the_shipped_8_bit_network_gives_the_checkpoints_verdicts(classifier: Classifier) -> None:
    """On the examples, whole, cropped and inverted. Fails until `training.quantize` ran for this checkpoint."""
    fast = engine.load_fastest(DEFAULT_CHECKPOINT, INT8)
    pictures = [open_picture(path) for path in find_pictures(ROOT / "examples")]
    pictures += [picture.crop((0, 0, picture.width // 2, picture.height)) for picture in pictures]
    pictures += [Image.fromarray(255 - np.asarray(picture)) for picture in pictures[:6]]
    for ours, theirs in zip(fast.predict(pictures), classifier.predict(pictures), strict=True):
        assert (ours.label, ours.verdict) == (theirs.label, theirs.verdict)
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=0.05)
