import math

import numpy as np
import pytest
from sklearn import metrics as reference

from evaluation.metrics import (
    Array,
    accuracy_by_source,
    auroc,
    auroc_by_source,
    average_precision,
    bootstrap,
    calibration_error,
    calibration_noise_floor,
    f1,
    precision_recall_curve,
    reliability,
    roc_curve,
    share,
    source_bootstrap,
    source_mean_accuracy,
    source_mean_auroc,
)


@pytest.fixture(params=["smooth", "with ties"])
def sample(request: pytest.FixtureRequest) -> tuple[Array, Array]:
    """Truth and scores of 500 pictures; memes tend to score higher."""
    draw = np.random.default_rng(3)
    truth = draw.random(500) < 0.4
    scores = (draw.normal(0.4, 0.2, 500) + 0.25 * truth).clip(0, 1)
    return truth, scores if request.param == "smooth" else scores.round(1)


def test_areas_are_scikit_learns(sample: tuple[Array, Array]) -> None:
    truth, scores = sample
    assert auroc(truth, scores) == pytest.approx(reference.roc_auc_score(truth, scores))
    assert average_precision(truth, scores) == pytest.approx(reference.average_precision_score(truth, scores))
    assert f1(truth, scores > 0.5) == pytest.approx(reference.f1_score(truth, scores > 0.5))


def test_curves_are_scikit_learns(sample: tuple[Array, Array]) -> None:
    truth, scores = sample
    false, true, _ = reference.roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc_curve(truth, scores), (false, true))
    precision, recall, _ = reference.precision_recall_curve(truth, scores)
    ours = precision_recall_curve(truth, scores)
    np.testing.assert_allclose(ours, (recall[-2::-1], precision[-2::-1]))


def test_wilsons_interval_is_the_textbooks() -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263."""
    estimate = share(np.arange(263) < 81)
    assert estimate.value == pytest.approx(0.3080, abs=5e-5)
    assert estimate.low == pytest.approx(0.2553, abs=5e-5)
    assert estimate.high == pytest.approx(0.3662, abs=5e-5)


def test_wilsons_interval_stays_inside_zero_and_one() -> None:
    for hits in (np.zeros(20, bool), np.ones(20, bool)):
        estimate = share(hits)
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low < estimate.high <= 1
        assert estimate.high - estimate.low > 0.1


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    estimate = bootstrap(lambda chosen: float(values[chosen].mean()), 400)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)


def test_an_errors_interval_is_not_pushed_up_by_resampling() -> None:
    """Of a calibrated classifier, the interval should reach down towards the true error of nothing."""
    draw = np.random.default_rng(2)
    scores = draw.random(1000)
    truth = draw.random(1000) < scores
    estimate = bootstrap(lambda i: calibration_error(truth[i], scores[i]), 1000, biased=True)
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < 0.6 * estimate.value
    assert estimate.value <= estimate.high


def test_what_is_not_defined_is_none() -> None:
    nothing = share(np.array([], bool))
    one_class = bootstrap(lambda chosen: auroc(np.ones(9, bool)[chosen], np.arange(9)[chosen]), 9)
    assert (nothing.value, one_class.value) == (None, None)
    assert math.isnan(average_precision(np.zeros(4, bool), np.arange(4)))
    assert math.isnan(f1(np.zeros(4, bool), np.zeros(4, bool)))


def test_calibration_error_of_known_bins() -> None:
    scores = np.repeat([0.1, 0.9], 50)
    truth = np.arange(100) % 50 < np.repeat([20, 45], 50)  # 40 % and 90 % memes
    mean_scores, meme_shares, counts = reliability(truth, scores)
    np.testing.assert_allclose(mean_scores, [0.1, 0.9])
    np.testing.assert_allclose(meme_shares, [0.4, 0.9])
    assert counts.tolist() == [50, 50]
    assert calibration_error(truth, scores) == pytest.approx(0.15)


def test_a_perfect_classifier_lies_at_the_noise_floor() -> None:
    draw = np.random.default_rng(5)
    scores = draw.random(1000)
    errors = [calibration_error(draw.random(1000) < scores, scores) for _ in range(50)]
    floor = calibration_noise_floor(scores)
    assert floor == pytest.approx(np.median(errors), abs=0.005)
    assert calibration_error(draw.random(1000) < scores**2, scores) > 3 * floor


@pytest.fixture
def sourced(sample: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """The same pictures from seven sources, of which some have memes, some others, and some both."""
    truth, scores = sample
    draw = np.random.default_rng(4)
    return truth, scores, np.where(truth, draw.integers(0, 5, 500), draw.integers(3, 7, 500)).astype(str)


def test_areas_by_source_are_scikit_learns_of_each_pair(sourced: tuple[Array, Array, Array]) -> None:
    truth, scores, sources = sourced
    areas = auroc_by_source(truth, scores, sources)
    assert areas.shape == (5, 4)
    for row, meme_source in enumerate("01234"):
        for column, other_source in enumerate("3456"):
            chosen = (truth & (sources == meme_source)) | (~truth & (sources == other_source))
            expected = reference.roc_auc_score(truth[chosen], scores[chosen])
            assert areas[row, column] == pytest.approx(expected)
    assert source_mean_auroc(truth, scores, sources) == pytest.approx(areas.mean())


def test_accuracy_by_source_weighs_sources_and_classes_alike() -> None:
    truth = np.array([True] * 5 + [False] * 3)
    right = np.array([True, True, True, True, False, True, False, False])
    sources = np.array(["a", "a", "a", "a", "b", "c", "c", "b"])
    memes, others = accuracy_by_source(truth, right, sources)
    assert memes.tolist() == [1, 0]
    assert others.tolist() == [0, 0.5]  # b, then c
    assert source_mean_accuracy(truth, right, sources) == pytest.approx((0.5 + 0.25) / 2)


def test_the_interval_over_sources_is_the_normal_one() -> None:
    """Of the mean of independent sources; as wide as the number of sources says, not that of pictures."""
    draw = np.random.default_rng(1)
    memes, others = draw.normal(0.9, 0.1, 50), draw.normal(0.8, 0.1, 60)
    estimate = source_bootstrap(lambda i, j: float(memes[i].mean() + others[j].mean()) / 2, 50, 60)
    mean = (memes.mean() + others.mean()) / 2
    half = 1.96 * math.hypot(memes.std() / math.sqrt(50), others.std() / math.sqrt(60)) / 2
    assert estimate.value == pytest.approx(mean)
    assert estimate.low == pytest.approx(mean - half, abs=0.003)
    assert estimate.high == pytest.approx(mean + half, abs=0.003)
    assert source_bootstrap(lambda i, _: float(memes[i].mean()), 50, 0).value is None
