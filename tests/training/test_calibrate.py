import math
from pathlib import Path

import numpy as np
import pytest
from commands import run

from evaluation.dataset import read_folder
from evaluation.metrics import Array
from images import open_picture
from model import DEFAULT_CHECKPOINT, MEME, Classifier, Preprocessing
from training import calibrate
from training.calibrate import fit_abstention_band, fit_temperature_and_shift, fit_threshold


def test_temperature_and_shift_undo_overconfidence_and_bias() -> None:
    draw = np.random.default_rng(0)
    margin = draw.normal(0, 2, 4_000)
    is_meme = draw.random(4_000) < 1 / (1 + np.exp(-margin))  # calibrated
    np.testing.assert_allclose(fit_temperature_and_shift(margin, is_meme), (1, 0), atol=0.07)
    np.testing.assert_allclose(fit_temperature_and_shift(3 * (margin + 0.7), is_meme), (3, -2.1), atol=0.2)
    album = draw.normal(-6, 2, 20_000)  # of which one picture in seventy is a meme
    is_meme = draw.random(20_000) < 1 / (1 + np.exp(-album))
    temperature, shift = fit_temperature_and_shift(album, is_meme)
    assert (1 / (1 + np.exp(-(album + shift) / temperature))).mean() == pytest.approx(is_meme.mean(), rel=0.05)
    assert temperature == pytest.approx(1, abs=0.15)
    sure = np.array([-5.0, -4, 4, 5])
    temperature, shift = fit_temperature_and_shift(sure, sure > 0)
    assert shift == pytest.approx(0, abs=1e-9)
    assert 1 / (1 + math.exp(-5 / temperature)) == pytest.approx(0.75, abs=0.03)  # two of two: (2 + 1) / (2 + 2)


def test_the_threshold_is_the_lowest_of_the_precision_that_is_aimed_at() -> None:
    probability = np.linspace(0, 1, 1001)
    is_meme = np.random.default_rng(0).random(1001) < probability
    threshold = fit_threshold(probability, is_meme)
    assert is_meme[probability >= threshold].mean() >= calibrate.AIM_PRECISION
    assert is_meme[probability >= threshold - 0.005].mean() < calibrate.AIM_PRECISION
    assert fit_threshold(probability, probability > 0.97) == pytest.approx(0.95)  # never reached
    assert fit_threshold(probability, probability > 0.1) == 0.5


def test_the_band_of_doubt_is_as_narrow_as_the_aim_allows() -> None:
    draw = np.random.default_rng(1)
    probability = draw.beta(0.2, 0.2, 5000)
    is_meme = draw.random(5000) < probability
    low, high = fit_abstention_band(probability, is_meme, 0.5)
    answered = (probability <= low) | (probability >= high)
    assert low < 0.5 < high
    assert answered.mean() >= 1 - calibrate.MOST_UNANSWERED
    # Every answer between 0.3 and 0.7 is wrong, every other right; they are 5 % of all.
    probability = np.concatenate([np.linspace(0.3, 0.7, 51), np.repeat([0.05, 0.95], 500)])
    is_meme = np.concatenate([probability[:51] < 0.5, probability[51:] > 0.5])
    low, high = fit_abstention_band(probability, is_meme, 0.5)
    assert 0.28 < low < 0.4
    assert 0.6 < high < 0.72
    certain = np.where(is_meme, 0.99, 0.01)
    assert fit_abstention_band(certain, is_meme, 0.5) == (0.5, 0.5)


def test_a_checkpoint_calibrated_anew_answers_at_another_size(
    folder: Path, tmp_path: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.pth"
    assert run(monkeypatch, calibrate.main, None, folder, "--input-size", "64", "--out", out) == 0
    calibrated = Classifier.load(out)
    assert calibrated.preprocessing.input_size == 64
    assert calibrated.about["calibrated_from"] == classifier.sha256
    assert calibrated.about["data_sha256"] == classifier.about["data_sha256"]
    assert calibrated.temperature != classifier.temperature


def test_what_is_calibrated_is_calibrated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probabilities(checkpoint: Path) -> list[float]:
        pictures = [open_picture(picture.path) for picture in read_folder(folder)]
        return [prediction.meme_probability for prediction in Classifier.load(checkpoint).predict(pictures)]

    given: list[Array] = []
    fit = calibrate.fit_threshold

    def spy(probability: Array, is_meme: Array) -> float:
        given.append(probability)
        return fit(probability, is_meme)

    monkeypatch.setattr(calibrate, "fit_threshold", spy)
    outs = [tmp_path / f"{n}.pth" for n in range(2)]
    for before, out in zip((DEFAULT_CHECKPOINT, outs[0]), outs, strict=True):
        assert run(monkeypatch, calibrate.main, None, folder, "--checkpoint", before, "--out", out) == 0
        np.testing.assert_allclose(probabilities(out), given[-1], atol=0.01)
    np.testing.assert_allclose(given[1], given[0], atol=0.03)  # little is left to do


def test_pictures_of_one_class_do_not_calibrate(folder: Path, classifier: Classifier) -> None:
    memes = [picture for picture in read_folder(folder) if picture.label == MEME]
    with pytest.raises(SystemExit, match="readable pictures of both classes"):
        calibrate.calibrate(classifier.network, Preprocessing(32), memes)
