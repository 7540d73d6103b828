"""Labelled pictures that exist as names only."""

from pathlib import Path

from evaluation.dataset import LabelledPicture


def labelled(label: str, source: str, count: int, group: str = "group") -> list[LabelledPicture]:
    """List pictures of one source. There are no files."""
    return [LabelledPicture(Path(label) / source / str(n), label, group, source) for n in range(count)]
