"""Calibrate a trained network on labelled pictures: temperature, thresholds, the band of doubt.

As a command, it calibrates a checkpoint for your own pictures: python -m training.calibrate DATA_DIR --out FILE
"""

import argparse
import math
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.dataset import LabelledPicture, open_batches, read_folder
from evaluation.metrics import Array, share
from gradcam import METHODS, evidence, forward_with_feature_map
from model import CLASSES, DEFAULT_CHECKPOINT, MEME, BadCheckpoint, Classifier, Preprocessing, write_checkpoint

AIM_PRECISION = 0.9  # at the balanced threshold: a family photo called a meme is the costlier error
AIM_RECALL_OF_NEARLY_ALL = 0.95
AIM_PRECISION_OF_CERTAIN = 0.98
AIM_OUTSIDE_BAND = 0.85  # accuracy of any tenth of the probability scale outside the band of doubt
SMALLEST_TENTH = 0.01  # share of the pictures; of fewer, no accuracy is demanded


@dataclass(frozen=True, slots=True)
class Calibration:
    """What validation pictures teach beyond the weights; see `model.Classifier` for the meaning."""

    temperature: float
    threshold: float
    not_sure: tuple[float, float]
    thresholds: dict[str, float]
    evidence_scales: dict[str, float]


def calibrate(
    network: nn.Module, preprocessing: Preprocessing, pictures: list[LabelledPicture]
) -> tuple[Calibration, float, Array, Array]:
    """Fit temperature, shift, thresholds and the band of doubt.

    Temperature and shift are fitted to all pictures. Thresholds and the band are fitted to the probabilities that each
    source gets when temperature and shift are fitted to the other sources, so that they hold for new sources.

    Args:
        network: from `model.for_inference`, so that the fit is to the very outputs that are used later.
        preprocessing: what makes the network's input.
        pictures: of both classes, best from sources that training never saw.

    Returns:
        The calibration, the shift (see `add_bias`), and the left-out probabilities of meme and the truth, both of
        shape (N,).

    Raises:
        SystemExit: if there are no readable pictures of one class.
    """
    margins, read = list[float](), list[LabelledPicture]()
    strongest: dict[str, list[float]] = defaultdict(list)
    for labelled, opened in open_batches(pictures):
        inputs = torch.stack([preprocessing(picture) for picture in opened])
        for layer in sorted({method.layer for method in METHODS.values()}):
            logits, feature_map = forward_with_feature_map(network, inputs, layer)
            for name in [name for name, method in METHODS.items() if method.layer == layer]:
                maps = [evidence(logits, feature_map, index, name) for index in range(len(CLASSES))]
                strongest[name] += torch.stack(maps, 1).amax((1, 2, 3)).tolist()
        meme = CLASSES.index(MEME)
        margins += (logits[:, meme] - logits[:, 1 - meme]).tolist()
        read += labelled
    is_meme, margin = np.array([picture.label == MEME for picture in read]), np.array(margins)
    if len(set(is_meme.tolist())) < len(CLASSES):
        raise SystemExit("To calibrate, there must be readable pictures of both classes.")
    temperature, shift = fit_temperature_and_shift(margin, is_meme)
    probability = left_out_probabilities(margin, is_meme, np.array([picture.source for picture in read]))
    threshold = fit_threshold(probability, is_meme, AIM_PRECISION)
    thresholds = {
        "nearly_all": min(threshold, fit_recall_threshold(probability, is_meme, AIM_RECALL_OF_NEARLY_ALL)),
        "balanced": threshold,
        "certain": max(threshold, fit_threshold(probability, is_meme, AIM_PRECISION_OF_CERTAIN)),
    }
    not_sure = fit_abstention_band(probability, is_meme, threshold)
    # Half of all pictures have a place that is painted in full red.
    scales = {name: float(np.median(values)) for name, values in strongest.items()}
    return Calibration(temperature, threshold, not_sure, thresholds, scales), shift, probability, is_meme


def left_out_probabilities(margin: Array, is_meme: Array, sources: Array) -> Array:
    """The probability of meme of each picture, with temperature and shift fitted to the other sources.

    Where the others have pictures of one class only, the fit is to all.

    Args:
        margin: difference of the logits, shape (N,).
        is_meme: shape (N,).
        sources: names, shape (N,).
    """
    probability = np.empty(len(margin))
    for source in np.unique(sources):
        left_out = sources == source
        rest = ~left_out if len(set(is_meme[~left_out].tolist())) == len(CLASSES) else np.ones_like(left_out)
        temperature, shift = fit_temperature_and_shift(margin[rest], is_meme[rest])
        probability[left_out] = 1 / (1 + np.exp(-(margin[left_out] + shift) / temperature))
    return probability


def fit_temperature_and_shift(margin: Array, is_meme: Array) -> tuple[float, float]:
    """Of least negative log-likelihood for (margin + shift) / temperature as log-odds.

    Platt 1999, "Probabilistic outputs for support vector machines"; with the temperature alone (Guo et al. 2017,
    arXiv 1706.04599), a network that saw both classes equally often calls too many pictures memes.
    """
    # Platt's targets: however well the pictures are told apart, so few cannot show that the next is, too.
    memes, others = is_meme.sum(), (~is_meme).sum()
    target = np.where(is_meme, (memes + 1) / (memes + 2), 1 / (others + 2))

    def loss(log_temperature: float, centre: float) -> float:
        odds = (margin - centre) / math.exp(log_temperature)
        return float((np.logaddexp(0, odds) - target * odds).mean())

    # Where nearly all pictures are of one class, even odds lie beyond all of them.
    least, most = margin.min(), margin.max()
    bounds = np.array([(math.log(0.1), math.log(10)), (2 * least - most, 2 * most - least)])
    best, reach = bounds.mean(1), np.ptp(bounds, axis=1) / 2
    for _ in range(14):  # grids around the best point so far; the loss has one minimum, in an oblique valley
        grid = best[:, None] + reach[:, None] * np.linspace(-1, 1, 13)
        best = np.array(min(product(*grid.clip(bounds[:, :1], bounds[:, 1:])), key=lambda point: loss(*point)))
        reach /= 2
    return math.exp(best[0]), -float(best[1])


def add_bias(weights: dict[str, Tensor], shift: float) -> dict[str, Tensor]:
    """The weights of the same network with a bias: towards meme, or away from it. No heatmap changes."""
    bias = weights["classifier.bias"]
    towards = torch.tensor([shift / 2 if name == MEME else -shift / 2 for name in CLASSES])
    return weights | {"classifier.bias": (bias.float() + towards).to(bias.dtype)}


def fit_threshold(probability: Array, is_meme: Array, aim: float) -> float:
    """The lowest threshold at which this share of those called memes are memes, else the most precise one.

    Never below even odds, however well the pictures are told apart.
    """
    thresholds = np.linspace(0.5, 0.99, 99)
    called = [is_meme[probability >= threshold] for threshold in thresholds]
    precision = np.array([memes.mean() if len(memes) else 0 for memes in called])
    reached = precision >= aim
    return float(thresholds[reached.argmax() if reached.any() else precision.argmax()])


def fit_recall_threshold(probability: Array, is_meme: Array, aim: float) -> float:
    """The highest threshold at which this share of the memes is called a meme."""
    memes = np.sort(probability[is_meme])
    return float(memes[-math.ceil(aim * len(memes))])


def fit_abstention_band(probability: Array, is_meme: Array, threshold: float) -> tuple[float, float]:
    """The narrowest band around the threshold outside of which the answers can be relied on.

    Outside it, every stretch of a tenth of the probability scale that holds at least `SMALLEST_TENTH` of the pictures
    is right as often as `AIM_OUTSIDE_BAND` says.

    Args:
        probability: of meme, shape (N,).
        is_meme: shape (N,).
        threshold: from which on a picture is called a meme.

    Returns:
        The lower and the upper edge; both equal the threshold if no band is needed.
    """
    right = (probability >= threshold) == is_meme
    grid = np.linspace(0, 1, 101)

    def reliable(low: float, high: float) -> bool:
        inside = (probability >= low) & (probability <= high)
        return bool(inside.mean() < SMALLEST_TENTH or right[inside].mean() >= AIM_OUTSIDE_BAND)

    below = [edge for edge in grid if edge <= threshold]
    above = [edge for edge in grid if edge >= threshold]
    unreliable_below = [edge for edge in below if not reliable(edge - 0.1, edge)]
    unreliable_above = [edge for edge in above if not reliable(edge, edge + 0.1)]
    low = min([threshold, *(edge - 0.01 for edge in unreliable_below)])
    high = max([threshold, *(edge + 0.01 for edge in unreliable_above)])
    return float(max(0, low)), float(min(1, high))


def main() -> int:
    """Read the command line, calibrate, write; 0 when done, 1 without both classes, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m training.calibrate", description="Calibrate a checkpoint anew on labelled pictures."
    )
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True)
    arguments = parser.parse_args()

    try:
        classifier = Classifier.load(arguments.checkpoint)
    except BadCheckpoint as error:
        parser.error(str(error))
    if classifier.classes != CLASSES:
        parser.error(f"{arguments.checkpoint} has its classes in another order than those trained here")
    calibration, shift, probability, is_meme = calibrate(
        classifier.network, classifier.preprocessing, read_folder(arguments.data)
    )
    right = share((probability >= calibration.threshold) == is_meme)
    about = classifier.about | {"calibrated_from": classifier.sha256, "validation_accuracy": asdict(right)}
    checkpoint = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    changed = asdict(calibration) | {"about": about}
    changed["state_dict"] = add_bias(checkpoint["state_dict"], shift)
    write_checkpoint(checkpoint | changed, arguments.out)
    print(f"{arguments.out}: {right.value:.1%} of the {len(is_meme)} pictures right; {calibration}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
