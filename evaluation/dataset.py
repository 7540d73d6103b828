"""Labelled pictures on disk: `meme/` and `not_meme/`, one sub-folder for each source."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

from images import BadImage, find_pictures, open_picture
from model import CLASSES, DEFAULT_CHECKPOINT, MEME

BATCH = 64


@dataclass(frozen=True, slots=True)
class LabelledPicture:
    """A file with its label, its group (what kind of negative, or `meme`) and its source (where it comes from)."""

    path: Path
    label: str
    group: str
    source: str


def read_folder(root: Path) -> list[LabelledPicture]:
    """List the labelled pictures below `root/meme` and `root/not_meme`."""
    pictures = []
    for label in CLASSES:
        for path in find_pictures(root / label):
            folders = path.relative_to(root / label).parts[:-1]
            folder = folders[0] if folders else label
            group, _, source = folder.partition("__")
            if label == MEME:
                group, source = MEME, folder
            pictures.append(LabelledPicture(path, label, group, source or folder))
    return pictures


def unseen_sources(pictures: list[LabelledPicture], training: list[LabelledPicture]) -> list[LabelledPicture]:
    """The pictures whose sources are not among the training pictures; of a class that has none, all.

    Pictures of known sources are easier. Calibrated on them, the network would be too sure elsewhere.
    """
    known = {(picture.label, picture.source) for picture in training}
    chosen = []
    for label in CLASSES:
        of_label = [picture for picture in pictures if picture.label == label]
        chosen += [picture for picture in of_label if (label, picture.source) not in known] or of_label
    return chosen


def open_batches(pictures: list[LabelledPicture]) -> Iterator[tuple[list[LabelledPicture], list[Image.Image]]]:
    """Open labelled pictures batch by batch, naming on stderr those that cannot be opened."""
    for start in tqdm(range(0, len(pictures), BATCH), desc="Validating", leave=False, unit="batch"):
        labelled, opened = [], []
        for picture in pictures[start : start + BATCH]:
            try:
                opened.append(open_picture(picture.path))
                labelled.append(picture)
            except BadImage as error:
                tqdm.write(f"{picture.path}: {error}", file=sys.stderr)
        if opened:
            yield labelled, opened


def plain_network(checkpoint: Path = DEFAULT_CHECKPOINT) -> nn.Module:
    """Torchvision's DenseNet121 with a checkpoint's weights, in full precision."""
    network: nn.Module = torchvision.models.densenet121(num_classes=len(CLASSES)).eval()
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    return network
