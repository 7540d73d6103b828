"""Fit what a trained network's answers mean on labelled pictures: temperature, threshold, the band of doubt.

As a command, it calibrates a checkpoint anew on your own pictures: python -m training.calibrate DATA_DIR --out FILE
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

AIM_PRECISION = 0.9  # a family photo called a meme is the costlier error
AIM_WHEN_ANSWERED = 0.985  # outside the band of doubt
MOST_UNANSWERED = 0.1  # share of the pictures inside it


@dataclass(frozen=True, slots=True)
class Calibration:
    """What validation pictures teach beyond the weights; see `model.Classifier` for the meaning."""

    temperature: float
    threshold: float
    not_sure: tuple[float, float]
    evidence_scales: dict[str, float]


def calibrate(
    network: nn.Module, preprocessing: Preprocessing, pictures: list[LabelledPicture]
) -> tuple[Calibration, float, Array, Array]:
    """Fit the calibration, and the shift to be given to the network itself, see `shifted`.

    Also return the probabilities of meme and the truth, both of shape (N,).

    Args:
        network: from `model.for_inference`, so that the fit is to the very answers that are given later.
        preprocessing: what makes the network's input.
        pictures: of both classes, best from sources that training never saw.
    """
    margins, truth = list[float](), list[bool]()
    strongest: dict[str, list[float]] = defaultdict(list)
    for labelled, opened in open_batches(pictures):
        inputs = torch.stack([preprocessing(picture) for picture in opened])
        for layer in sorted({method.layer for method in METHODS.values()}):
            logits, feature_map = forward_with_feature_map(network, inputs, layer)
            for name in [name for name, method in METHODS.items() if method.layer == layer]:
                maps = [evidence(logits, feature_map, index, name) for index in range(len(CLASSES))]
                strongest[name] += torch.stack(maps, 1).amax((1, 2, 3)).tolist()
        ours = CLASSES.index(MEME)
        margins += (logits[:, ours] - logits[:, 1 - ours]).tolist()
        truth += [picture.label == MEME for picture in labelled]
    if len(set(truth)) < len(CLASSES):
        raise SystemExit("To calibrate, there must be readable pictures of both classes.")
    is_meme, margin = np.array(truth), np.array(margins)
    temperature, shift = fit_temperature_and_shift(margin, is_meme)
    probability = 1 / (1 + np.exp(-(margin + shift) / temperature))
    threshold = fit_threshold(probability, is_meme)
    not_sure = fit_abstention_band(probability, is_meme, threshold)
    # Half of all pictures have a place that is painted in full red.
    scales = {name: float(np.median(values)) for name, values in strongest.items()}
    return Calibration(temperature, threshold, not_sure, scales), shift, probability, is_meme


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


def shifted(weights: dict[str, Tensor], shift: float) -> dict[str, Tensor]:
    """The weights of the same network with a bias: towards meme, or away from it. No heatmap changes."""
    bias = weights["classifier.bias"]
    towards = torch.tensor([shift / 2 if name == MEME else -shift / 2 for name in CLASSES])
    return weights | {"classifier.bias": (bias.float() + towards).to(bias.dtype)}


def fit_threshold(probability: Array, is_meme: Array) -> float:
    """The lowest threshold at which `AIM_PRECISION` of those called memes are memes, else the most precise one.

    Never below even odds, however well the pictures are told apart.
    """
    thresholds = np.linspace(0.5, 0.95, 91)
    called = [is_meme[probability >= threshold] for threshold in thresholds]
    precision = np.array([memes.mean() if len(memes) else 0 for memes in called])
    reached = precision >= AIM_PRECISION
    return float(thresholds[reached.argmax() if reached.any() else precision.argmax()])


def fit_abstention_band(probability: Array, is_meme: Array, threshold: float) -> tuple[float, float]:
    """The narrowest band around the threshold outside of which answers are right as often as is aimed at.

    It never leaves more than `MOST_UNANSWERED` of the pictures without an answer.
    """
    right = (probability >= threshold) == is_meme
    centre = math.log(threshold / (1 - threshold))
    low = high = threshold
    for half in np.linspace(0, 4, 81):
        low_ = min(threshold, 1 / (1 + math.exp(half - centre)))
        high_ = max(threshold, 1 / (1 + math.exp(-half - centre)))
        answered = (probability <= low_) | (probability >= high_)
        if answered.mean() < 1 - MOST_UNANSWERED:
            break
        low, high = low_, high_
        if right[answered].mean() >= AIM_WHEN_ANSWERED:
            break
    return low, high


def main() -> int:
    """Read the command line, calibrate, write; 0 when done, 1 without both classes, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Calibrate a checkpoint anew on labelled pictures.")
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--input-size", type=int, metavar="PIXELS", help="another input size for the network")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True)
    arguments = parser.parse_args()

    try:
        classifier = Classifier.load(arguments.checkpoint)
    except BadCheckpoint as error:
        parser.error(str(error))
    if classifier.classes != CLASSES:
        parser.error(f"{arguments.checkpoint} has its classes in another order than those trained here")
    old = classifier.preprocessing
    preprocessing = Preprocessing(arguments.input_size or old.input_size, old.mean, old.std)
    calibration, shift, probability, is_meme = calibrate(classifier.network, preprocessing, read_folder(arguments.data))
    right = share((probability >= calibration.threshold) == is_meme)
    about = classifier.about | {"calibrated_from": classifier.sha256, "validation_accuracy": asdict(right)}
    checkpoint = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    changed = asdict(calibration) | {"input_size": preprocessing.input_size, "about": about}
    changed["state_dict"] = shifted(checkpoint["state_dict"], shift)
    write_checkpoint(checkpoint | changed, arguments.out)
    print(f"{arguments.out}: {right.value:.1%} right of the {len(is_meme)} pictures it was fitted to; {calibration}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
