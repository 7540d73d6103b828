"""Formulas of classification: shares, curves and calibration, with their 95 % intervals.

Throughout, `truth` is boolean (true: a meme) and `scores` the probability of meme, both of shape (N,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15  # equal-width bins of the calibration error
RESAMPLES = 1000
Z = 1.96  # half width of a 95 % interval, in standard errors

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with its 95 % interval; None where the data do not define it."""

    value: float | None
    low: float | None
    high: float | None


def share(hits: Array) -> Estimate:
    """The share of true values, with Wilson's score interval (Wilson 1927, JASA 22:209)."""
    n = len(hits)
    if n == 0:
        return Estimate(None, None, None)
    p = float(hits.mean())
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(statistic: Callable[[Array], float], n: int, *, biased: bool = False) -> Estimate:
    """A statistic of n pictures with its percentile interval over seeded resamples.

    Args:
        statistic: from indices of pictures, shape (n,), to a value; NaN where it is undefined.
        n: number of pictures.
        biased: for a statistic that resampling alone makes larger, as it does errors. The interval
            is then reflected at the value (the "basic" bootstrap, Davison & Hinkley 1997, section
            5.2), but reaches from 0 at the lowest to the value at least.
    """
    value = statistic(np.arange(n))
    if math.isnan(value):
        return Estimate(None, None, None)
    draw = np.random.default_rng(0)
    values = [statistic(draw.integers(0, n, n)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(values, (2.5, 97.5))
    if biased:
        low, high = max(0.0, 2 * value - high), max(value, 2 * value - low)
    return Estimate(value, float(low), float(high))


def source_bootstrap(statistic: Callable[[Array, Array], float], memes: int, others: int) -> Estimate:
    """A statistic of whole sources with its percentile interval over seeded resamples of sources of each class.

    Args:
        statistic: from indices of sources of memes, shape (memes,), and of others, shape (others,), to a value.
        memes: number of sources of memes.
        others: number of sources of other pictures.
    """
    if not memes or not others:
        return Estimate(None, None, None)
    draw = np.random.default_rng(0)
    values = [statistic(draw.integers(0, memes, memes), draw.integers(0, others, others)) for _ in range(RESAMPLES)]
    low, high = np.percentile(values, (2.5, 97.5))
    return Estimate(statistic(np.arange(memes), np.arange(others)), float(low), float(high))


def accuracy_by_source(truth: Array, right: Array, sources: Array) -> tuple[Array, Array]:
    """The accuracy on each source of memes and on each source of other pictures, both sorted by source.

    Args:
        truth: shape (N,).
        right: whether each answer is right, shape (N,).
        sources: names, shape (N,). A source that has both kinds of pictures counts once for each.
    """
    memes, others = (
        np.array([right[kind & (sources == source)].mean() for source in np.unique(sources[kind])])
        for kind in (truth, ~truth)
    )
    return memes, others


def auroc_by_source(truth: Array, scores: Array, sources: Array) -> Array:
    """How often a meme scores above another picture, for each pair of sources; ties count half.

    The mean over all pairs is the area under the ROC curve with all sources weighing alike.

    Returns:
        Shape (sources of memes, sources of others), both sorted by source.
    """
    others = [np.sort(scores[~truth & (sources == source)]) for source in np.unique(sources[~truth])]
    rows = []
    for source in np.unique(sources[truth]):
        own = scores[truth & (sources == source)]
        wins = [
            (np.searchsorted(o, own, "left") + np.searchsorted(o, own, "right")).mean() / 2 / len(o) for o in others
        ]
        rows.append(wins)
    return np.array(rows)


def source_mean_accuracy(truth: Array, right: Array, sources: Array) -> float:
    """Accuracy as the mean over the sources of each class, then over the classes."""
    memes, others = accuracy_by_source(truth, right, sources)
    return float(memes.mean() + others.mean()) / 2


def source_mean_auroc(truth: Array, scores: Array, sources: Array) -> float:
    """Area under the ROC curve with all sources weighing alike."""
    return float(auroc_by_source(truth, scores, sources).mean())


def f1(truth: Array, said: Array) -> float:
    """Harmonic mean of precision and recall; NaN without any meme, true or claimed."""
    total = int(truth.sum()) + int(said.sum())
    return 2 * int((truth & said).sum()) / total if total else math.nan


def auroc(truth: Array, scores: Array) -> float:
    """Probability that a meme scores above a non-meme, ties counting half (Mann-Whitney U)."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # tied scores share their mean rank
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(truth: Array, scores: Array) -> float:
    """Sum of precision times the step in recall, over falling thresholds."""
    if not truth.any():
        return math.nan
    recall, precision = precision_recall_curve(truth, scores)
    return float(np.sum(np.diff(recall, prepend=0) * precision))


def precision_recall_curve(truth: Array, scores: Array) -> tuple[Array, Array]:
    """Recall and precision at every threshold that the scores take, from high to low."""
    hits, claims = _cumulative(truth, scores)
    return hits / max(1, truth.sum()), hits / claims


def roc_curve(truth: Array, scores: Array) -> tuple[Array, Array]:
    """False and true positive rate at every threshold that the scores take, from (0, 0) on."""
    hits, claims = _cumulative(truth, scores)
    false = (claims - hits) / max(1, (~truth).sum())
    return np.append(0, false), np.append(0, hits / max(1, truth.sum()))


def _cumulative(truth: Array, scores: Array) -> tuple[Array, Array]:
    """True memes and all pictures at or above each distinct score, from high to low."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each run of ties
    return np.cumsum(truth[order])[last], last + 1


def reliability(truth: Array, scores: Array) -> tuple[Array, Array, Array]:
    """Mean score, share of memes and count of the pictures in each filled bin."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = counts > 0
    mean_scores = np.bincount(bins, scores, BINS)[filled] / counts[filled]
    meme_shares = np.bincount(bins, truth, BINS)[filled] / counts[filled]
    return mean_scores, meme_shares, counts[filled]


def calibration_error(truth: Array, scores: Array) -> float:
    """Expected calibration error of the meme probability (Naeini et al. 2015, AAAI), equal-width bins."""
    mean_scores, meme_shares, counts = reliability(truth, scores)
    return float(np.sum(counts * np.abs(mean_scores - meme_shares)) / len(scores))


def calibration_noise_floor(scores: Array) -> float:
    """Median calibration error of a perfectly calibrated classifier that gives these same scores."""
    draw = np.random.default_rng(0)
    return float(np.median([calibration_error(draw.random(len(scores)) < scores, scores) for _ in range(200)]))
