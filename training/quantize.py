"""Quantise a checkpoint to 8 bits for OpenVINO: python -m training.quantize DATA_DIR

DATA_DIR holds validation pictures in `meme/` and `not_meme/`. Writes CHECKPOINT.int8.xml and .bin beside the
checkpoint; `engine.load_fastest` uses them where they are faster. Run it after each change of the checkpoint.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine import INT8, compile_converted, convert_network, quantized_path, save_converted
from evaluation.dataset import LabelledPicture, open_batches, read_folder
from model import DEFAULT_CHECKPOINT, BadCheckpoint, Classifier

CALIBRATION_PICTURES = 300  # the default of nncf.quantize
TEST_PICTURES = 500


@dataclass(frozen=True, slots=True)
class Shift:
    """How far the 8-bit network's probabilities are from the checkpoint's on pictures not used for calibration.

    Attributes:
        pictures: how many.
        mean: mean distance of the probabilities.
        largest: largest distance.
        other_labels: how many labels differ before close cases are computed again.
    """

    pictures: int
    mean: float
    largest: float
    other_labels: int


def split_by_source(
    pictures: list[LabelledPicture], calibration: int, test: int
) -> tuple[list[LabelledPicture], list[LabelledPicture]]:
    """Draw two disjoint lists at random, each with about the same share of every source."""
    draw = random.Random(0)
    by_source: dict[tuple[str, str], list[LabelledPicture]] = defaultdict(list)
    for picture in pictures:
        by_source[picture.label, f"{picture.group}__{picture.source}"].append(picture)
    ranked = []
    for source in by_source.values():
        draw.shuffle(source)
        ranked += [((rank + draw.random()) / len(source), picture) for rank, picture in enumerate(source)]
    ordered = [picture for _, picture in sorted(ranked, key=lambda pair: pair[0])]
    return ordered[:calibration], ordered[calibration : calibration + test]


def inputs_of(classifier: Classifier, pictures: list[LabelledPicture]) -> Iterator[Tensor]:
    """The network's inputs for these pictures, in batches of shape (N, 3, S, S)."""
    for _, opened in open_batches(pictures):
        yield classifier.preprocess(opened)


def quantize(classifier: Classifier, pictures: list[LabelledPicture]) -> Any:
    """Quantise a classifier's network to 8 bits, calibrated on these pictures; the result is in OpenVINO's format.

    The "mixed" preset quantises weights symmetrically and activations asymmetrically.

    Args:
        classifier: in full precision.
        pictures: a few hundred; more than those, NNCF does not use.
    """
    examples = [one[None].numpy() for batch in inputs_of(classifier, pictures) for one in batch]
    return nncf.quantize(
        convert_network(classifier.network, classifier.preprocessing.input_size),
        nncf.Dataset(examples),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(examples),
    )


def measure_shift(classifier: Classifier, quantized: Any, pictures: list[LabelledPicture]) -> Shift:
    """Compare the 8-bit network's probabilities with those of the classifier, which is in full precision."""
    network = compile_converted(quantized, classifier.network, INT8)
    shifts, other_labels = list[float](), 0
    for inputs in inputs_of(classifier, pictures):
        with torch.inference_mode():
            pairs = zip(
                classifier.read_logits(classifier.network(inputs)),
                classifier.read_logits(network(inputs)),
                strict=True,
            )
        for exact, rounded in pairs:
            shifts.append(abs(exact.meme_probability - rounded.meme_probability))
            other_labels += exact.label != rounded.label
    return Shift(len(shifts), float(np.mean(shifts)), max(shifts), other_labels)


def main() -> int:
    """Read the command line, quantise, measure, write; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m training.quantize", description="Quantise a checkpoint to 8 bits for OpenVINO."
    )
    parser.add_argument("data", type=Path, help="folder of validation pictures with meme/ and not_meme/")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    arguments = parser.parse_args()
    try:
        classifier = Classifier.load(arguments.checkpoint, torch.float32)
    except BadCheckpoint as error:
        parser.error(str(error))
    calibration, test = split_by_source(read_folder(arguments.data), CALIBRATION_PICTURES, TEST_PICTURES)
    if not test:
        parser.error(f"{arguments.data} must hold more than {CALIBRATION_PICTURES} pictures in meme/ and not_meme/")
    quantized = quantize(classifier, calibration)
    shift = measure_shift(classifier, quantized, test)
    path = quantized_path(arguments.checkpoint)
    save_converted(quantized, path, classifier.sha256, shift.largest)
    tqdm.write(
        f"{path}: on {shift.pictures} other pictures, probabilities move by {shift.mean:.4f} on average and "
        f"{shift.largest:.4f} at most; {shift.other_labels} labels change before close cases are computed again"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
