"""The stream of pictures that a network is trained on: what is drawn, how often, and as which tensors."""

import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm

from evaluation.dataset import LabelledPicture
from images import BadImage, open_picture
from model import CLASSES, Preprocessing
from training.augment import Augment

NO_LABEL = -100  # the index that cross_entropy ignores
TEMPLATE_SHARE = 0.15  # share of the extra pictures among the draws without a label


class TrainingStream(IterableDataset[tuple[dict[int, Tensor], Tensor]]):
    """An endless stream of augmented pictures, drawn by `balanced_weights`.

    Each item is the same picture at every requested size, shape (3, S, S) by S, and the indices of its class and its
    group, shape (2,). A run that resumes at a later step draws anew from there; the same step gives the same draws.

    Args:
        pictures: labelled pictures to draw from.
        sizes: input sizes, in pixels.
        first_step: step at which the run starts or resumes.
        unlabelled: if given, every second draw is a random part of a picture or of one of these, with `NO_LABEL`.
        seed: seed of the draws.
    """

    def __init__(
        self,
        pictures: list[LabelledPicture],
        sizes: set[int],
        first_step: int,
        *,
        unlabelled: list[Path] | None = None,
        seed: int = 0,
    ) -> None:
        self.pictures = pictures
        self.groups = group_names(pictures)
        self.preprocessings = {size: Preprocessing(size) for size in sizes}
        self.first_step = first_step
        self.unlabelled = unlabelled
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
        worker = get_worker_info()
        generator = random.Random(f"{self.seed}-{self.first_step}-{worker.id if worker else 0}")
        augment = Augment(generator)
        weights = balanced_weights(self.pictures)
        while True:
            for number, drawn in enumerate(generator.choices(self.pictures, weights, k=1024)):
                labelled = self.unlabelled is None or number % 2 == 0
                path = drawn.path
                if not labelled and self.unlabelled and generator.random() < TEMPLATE_SHARE:
                    path = generator.choice(self.unlabelled)
                try:
                    picture = open_picture(path)
                except BadImage as error:
                    tqdm.write(f"{path}: {error}", file=sys.stderr)
                    continue
                picture = augment(picture) if labelled else augment.random_part(picture)
                target = [CLASSES.index(drawn.label), self.groups.index(drawn.group)] if labelled else [NO_LABEL] * 2
                yield (
                    {size: preprocess(picture) for size, preprocess in self.preprocessings.items()},
                    torch.tensor(target),
                )


def group_names(pictures: list[LabelledPicture]) -> list[str]:
    """The names of the groups, in the order of the outputs that follow those of the classes."""
    return sorted({picture.group for picture in pictures})


def balanced_weights(pictures: list[LabelledPicture]) -> list[float]:
    """Sampling weights: half of the draws for each class, square roots of the sizes below that.

    A source of n pictures weighs √n, and a group the square root of its sources' sum. Otherwise a few large uniform
    sources, and photos, which are easy and many, would crowd out the rest.
    """
    sources = Counter((p.label, p.group, p.source) for p in pictures)
    groups: dict[tuple[str, str], float] = defaultdict(float)
    labels: dict[str, float] = defaultdict(float)
    for (label, group, _), size in sources.items():
        groups[label, group] += math.sqrt(size)
    for (label, _), size_root in groups.items():
        labels[label] += math.sqrt(size_root)
    return [
        sources[p.label, p.group, p.source] ** -0.5 * groups[p.label, p.group] ** -0.5 / labels[p.label]
        for p in pictures
    ]
