from pathlib import Path

import numpy as np
import pytest
from commands import run

import calibrate
from calibrate import fit_not_sure, fit_temperature, fit_threshold
from evaluate import read_folder
from model import MEME, Classifier, Preprocessing


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
    assert is_meme[probability >= threshold].mean() >= calibrate.AIM_PRECISION
    assert is_meme[probability >= threshold - 0.005].mean() < calibrate.AIM_PRECISION
    assert fit_threshold(probability, probability > 0.97) == pytest.approx(0.95)  # never reached


def test_the_band_of_doubt_is_as_narrow_as_the_aim_allows() -> None:
    draw = np.random.default_rng(1)
    probability = draw.beta(0.2, 0.2, 5000)
    is_meme = draw.random(5000) < probability
    low, high = fit_not_sure(probability, is_meme, 0.5)
    answered = (probability <= low) | (probability >= high)
    assert low < 0.5 < high
    assert answered.mean() >= 1 - calibrate.MOST_UNANSWERED
    # Every answer between 0.3 and 0.7 is wrong, every other right; they are 5 % of all.
    probability = np.concatenate([np.linspace(0.3, 0.7, 51), np.repeat([0.05, 0.95], 500)])
    is_meme = np.concatenate([probability[:51] < 0.5, probability[51:] > 0.5])
    low, high = fit_not_sure(probability, is_meme, 0.5)
    assert 0.28 < low < 0.4
    assert 0.6 < high < 0.72
    certain = np.where(is_meme, 0.99, 0.01)
    assert fit_not_sure(certain, is_meme, 0.5) == (0.5, 0.5)


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


def test_pictures_of_one_class_do_not_calibrate(folder: Path, classifier: Classifier) -> None:
    memes = [picture for picture in read_folder(folder) if picture.label == MEME]
    with pytest.raises(SystemExit, match="readable pictures of both classes"):
        calibrate.calibrate(classifier.network, Preprocessing(32), memes)
