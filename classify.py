"""Sort pictures from the command line: python classify.py PATH... --csv FILE

A PATH is a picture or a folder, which is searched with all its sub-folders. Nothing is moved or changed.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from tqdm import tqdm

from images import BadImage, find_pictures, open_picture
from model import DEFAULT_CHECKPOINT, BadCheckpoint, Classifier, Prediction

BATCH = 16
# Linux file names may be any bytes: what is no UTF-8 goes out as it came in.
AS_IT_CAME: Any = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
COLUMNS = ("path", "label", "meme_probability", "verdict", "error")


def classify(classifier: Classifier, paths: list[Path]) -> Iterator[tuple[Path, Prediction | BadImage]]:
    """Give each path, in order, with its prediction or with what is wrong with the file."""
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        opened = [_open(path) for path in batch]
        predictions = iter(classifier.predict([picture for picture in opened if isinstance(picture, Image.Image)]))
        for path, picture in zip(batch, opened, strict=True):
            yield path, picture if isinstance(picture, BadImage) else next(predictions)


def _look_into(path: Path) -> list[Path]:
    return find_pictures(path) if os.path.isdir(path) else [path]  # noqa: PTH112  (Path.is_dir can raise)


def _open(path: Path) -> Image.Image | BadImage:
    try:
        return open_picture(path)
    except BadImage as error:
        return error


def csv_row(path: Path, answer: Prediction | BadImage) -> tuple[str, ...]:
    """One row in the order of `COLUMNS`; a path can't be taken for a formula by a spreadsheet."""
    text = str(path)
    if text.startswith(("=", "+", "-", "@", "\t", "\r")):  # CWE-1236; quotes alone don't stop it
        text = "'" + text
    if isinstance(answer, BadImage):
        return text, "", "", "", str(answer)
    return text, answer.label, f"{answer.meme_probability:.4f}", answer.verdict, ""


def main() -> int:
    """Read the command line and classify; 0 when all was read, 1 when some files failed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Say of pictures whether they are memes.")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a picture, or a folder to search")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where to write the table (default: standard output)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    arguments = parser.parse_args()

    paths = [found for path in arguments.paths for found in _look_into(path)]
    if arguments.csv and os.path.realpath(arguments.csv) in map(os.path.realpath, paths):
        parser.error(f"{arguments.csv} is one of the pictures")
    failed = 0
    with ExitStack() as stack:
        try:
            classifier = Classifier.load(arguments.checkpoint)
            table: TextIO = sys.stdout
            if arguments.csv:
                table = stack.enter_context(arguments.csv.open("w", **AS_IT_CAME))
            elif isinstance(sys.stdout, TextIOWrapper):
                sys.stdout.reconfigure(**AS_IT_CAME)
        except BadCheckpoint as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"{arguments.csv} cannot be written: {error.strerror}")
        writer = csv.writer(table)
        writer.writerow(COLUMNS)
        for path, answer in tqdm(classify(classifier, paths), total=len(paths), unit="picture"):
            writer.writerow(csv_row(path, answer))
            if isinstance(answer, BadImage):
                failed += 1
                tqdm.write(f"{path}: {answer}", file=sys.stderr)
    print(f"{len(paths) - failed} pictures classified, {failed} files failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
