import math
from pathlib import Path

import numpy as np
import pytest
from commands import run

from evaluation.dataset import read_folder
from evaluation.metrics import Array
from images import open_picture
from model import MEME, Classifier, Preprocessing
from training import calibrate
from training.calibrate import (
    fit_abstention_band,
    fit_recall_threshold,
    fit_temperature_and_shift,
    fit_threshold,
    left_out_probabilities,
)


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
    threshold = fit_threshold(probability, is_meme, 0.9)
    assert is_meme[probability >= threshold].mean() >= 0.9
    assert is_meme[probability >= threshold - 0.005].mean() < 0.9
    assert fit_threshold(probability, is_meme, 0.8) < threshold
    assert fit_threshold(probability, probability > 0.999, 0.9) == pytest.approx(0.99)  # never reached
    assert fit_threshold(probability, probability > 0.1, 0.9) == 0.5


@pytest.mark.parametrize("aim", [0.95, 0.5])
def test_the_recall_threshold_is_the_highest_that_finds_so_many(aim: float) -> None:
    draw = np.random.default_rng(0)
    probability, is_meme = draw.random(500), draw.random(500) < 0.3
    threshold = fit_recall_threshold(probability, is_meme, aim)
    assert (probability[is_meme] >= threshold).mean() >= aim
    assert (probability[is_meme] > threshold).mean() < aim


def accuracy_outside(probability: Array, is_meme: Array, low: float, high: float) -> list[float]:
    """Of each tenth of the scale, outside the band, that holds one picture in a hundred."""
    outside = (probability <= low) | (probability >= high)
    tenths = (probability * 10).astype(int).clip(0, 9)
    right = (probability >= 0.5) == is_meme
    chosen = [outside & (tenths == tenth) for tenth in range(10)]
    return [right[inside].mean() for inside in chosen if inside.mean() >= calibrate.SMALLEST_TENTH]


def test_outside_the_band_every_tenth_is_mostly_right() -> None:
    draw = np.random.default_rng(1)
    probability = draw.random(20_000)
    is_meme = draw.random(20_000) < probability  # so at 0.8, four of five are memes
    low, high = fit_abstention_band(probability, is_meme, 0.5)
    assert min(accuracy_outside(probability, is_meme, low, high)) >= calibrate.AIM_OUTSIDE_BAND
    assert min(accuracy_outside(probability, is_meme, low + 0.1, high - 0.1)) < calibrate.AIM_OUTSIDE_BAND
    # An island of errors far from the threshold lies inside the band, too.
    probability = np.concatenate([np.linspace(0.88, 0.92, 40), np.repeat([0.05, 0.7, 0.99], 500)])
    is_meme = np.concatenate([np.zeros(40, bool), probability[40:] > 0.5])
    low, high = fit_abstention_band(probability, is_meme, 0.5)
    assert low == 0.5
    assert 0.88 < high <= 0.93
    certain = np.where(is_meme, 0.99, 0.01)
    assert fit_abstention_band(certain, is_meme, 0.5) == (0.5, 0.5)


def test_a_source_has_no_part_in_the_fit_of_its_own_probabilities() -> None:
    draw = np.random.default_rng(0)
    margin = draw.normal(0, 2, 400)
    is_meme = draw.random(400) < 1 / (1 + np.exp(-margin))
    sources = np.repeat(["a", "b", "c", "d"], 100)
    before = left_out_probabilities(margin, is_meme, sources)
    others = sources != "b"
    temperature, shift = fit_temperature_and_shift(margin[others], is_meme[others])
    np.testing.assert_allclose(before[~others], 1 / (1 + np.exp(-(margin[~others] + shift) / temperature)))
    after = left_out_probabilities(margin, np.where(others, is_meme, ~is_meme), sources)
    np.testing.assert_array_equal(after[~others], before[~others])
    assert (after[others] != before[others]).all()
    one_of_each = np.where(is_meme, "memes", "others")  # without either source there is one class only
    assert np.isfinite(left_out_probabilities(margin, is_meme, one_of_each)).all()


def test_a_checkpoint_calibrated_anew_means_what_the_pictures_say(
    folder: Path, tmp_path: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.pth"
    assert run(monkeypatch, calibrate.main, None, folder, "--out", out) == 0
    calibrated = Classifier.load(out)
    assert calibrated.about["calibrated_from"] == classifier.sha256
    assert calibrated.about["data_sha256"] == classifier.about["data_sha256"]
    assert calibrated.temperature != classifier.temperature
    assert calibrated.thresholds["nearly_all"] <= calibrated.threshold == calibrated.thresholds["balanced"]
    assert calibrated.threshold <= calibrated.thresholds["certain"]
    pictures = read_folder(folder)
    given = calibrated.predict([open_picture(picture.path) for picture in pictures])
    # Half of the pictures are memes, so this is what a calibrated network says on average.
    assert np.mean([prediction.meme_probability for prediction in given]) == pytest.approx(0.5, abs=0.05)


def test_pictures_of_one_class_do_not_calibrate(folder: Path, classifier: Classifier) -> None:
    memes = [picture for picture in read_folder(folder) if picture.label == MEME]
    with pytest.raises(SystemExit, match="readable pictures of both classes"):
        calibrate.calibrate(classifier.network, Preprocessing(32), memes)
