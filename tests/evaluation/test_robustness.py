import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from commands import run
from pictures import noise

from evaluation import robustness
from evaluation.dataset import read_folder
from evaluation.robustness import CORRUPTIONS, balanced_sample, measure_effect
from model import MEME, NOT_MEME, Classifier, Prediction

SETTINGS = [(name, severity) for name, (_, severities) in CORRUPTIONS.items() for severity in severities]


@pytest.mark.parametrize(("name", "severity"), SETTINGS)
def test_a_corruption_changes_a_copy(name: str, severity: float) -> None:
    picture = noise(120, 90)
    before = picture.tobytes()
    corrupted = CORRUPTIONS[name][0](picture, severity)
    assert picture.tobytes() == before
    assert corrupted.mode == "RGB"
    assert corrupted.size != picture.size or corrupted.tobytes() != before


@pytest.mark.parametrize(
    "name", ["JPEG quality", "scaled down and up, factor", "Gaussian noise, sigma", "sticker, part"]
)
def test_severities_grow(name: str) -> None:
    picture = noise(120, 90)
    apply, severities = CORRUPTIONS[name]
    clean = np.asarray(picture, float)
    damage = [float(np.abs(np.asarray(apply(picture, severity), float) - clean).mean()) for severity in severities]
    assert damage == sorted(damage)


def test_geometry() -> None:
    picture = noise(100, 60)
    assert robustness.crop(picture, 0.2).size == (80, 48)
    assert robustness.border(picture, 0.1).size == (120, 80)
    assert robustness.letterbox(picture, 0.5).size == (100, 120)
    assert robustness.blank_bar(picture, 0.5).size == (100, 90)
    assert CORRUPTIONS["rotated, degrees"][0](picture, 90).size == (60, 100)
    middle = (0, 20, 100, 40)
    assert robustness.blur_edges(picture, 0.3).crop(middle).tobytes() == picture.crop(middle).tobytes()


def test_flips_are_counted_by_class() -> None:
    def answers(labels: str) -> list[Prediction]:
        return [Prediction(MEME if c == "m" else NOT_MEME, 0.9 if c == "m" else 0.1, "") for c in labels]

    truth = [MEME] * 4 + [NOT_MEME] * 4
    effect = measure_effect("name", 1, answers("mmmnnnnm"), answers("mmnmnnmm"), truth)
    assert effect.accuracy.value == pytest.approx(5 / 8)
    assert effect.flip_rate.value == pytest.approx(3 / 8)
    assert effect.memes_lost.value == pytest.approx(1 / 3)
    assert effect.others_turned.value == pytest.approx(1 / 3)
    assert effect.probability_shift == pytest.approx(0.8 * 3 / 8)


def test_the_sample_is_even_and_repeats(folder: Path) -> None:
    pictures = read_folder(folder)
    assert Counter(p.label for p in balanced_sample(pictures, 3)) == {MEME: 3, NOT_MEME: 3}
    assert balanced_sample(pictures, 3) == balanced_sample(pictures, 3)
    assert len(balanced_sample(pictures, 99)) == len(pictures)


def test_the_command_writes_every_setting(
    folder: Path,
    tmp_path: Path,
    tiny_classifier: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "meme" / "one" / "0.png").write_bytes(b"no picture")
    out = tmp_path / "robustness.json"
    assert run(monkeypatch, robustness.main, tiny_classifier, folder, "--json", out) == 0
    figures = json.loads(out.read_text())
    assert figures["n"] == {MEME: 7, NOT_MEME: 8}
    assert [(e["corruption"], e["severity"]) for e in figures["effects"]] == [("none", 0), *SETTINGS]
    assert figures["effects"][0]["flip_rate"]["value"] == 0
    output = capsys.readouterr()
    assert "0.png: This file is not a picture" in output.err
    assert output.out.count("\n|") == len(SETTINGS) + 3
