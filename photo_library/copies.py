"""Save copies of pictures, sorted into folders by verdict, and their heatmaps. No file is ever overwritten."""

import hashlib
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from uuid import uuid4

from tqdm import tqdm

from gradcam import Explanation, overlay_png, pad_to_picture
from images import SUFFIXES, has_suffix, open_picture
from model import NOT_SURE, Classifier
from tables import Row

OVERLAY = re.compile(rf"\.({'|'.join(SUFFIXES)})(_\d+)?\.png$", re.IGNORECASE)  # how `overlay_path` names one
MAX_NAME = 255  # bytes of a file's name, on most file systems
OVERLAY_NUMBER = "_99999"  # room for what `numbered` adds to a name


class NewFiles:
    """Saves files without overwriting any. Threads may share it.

    If a name is taken, the file gets a number. If a file of this name has the same content, nothing is written.
    Digests and the last number of each name are kept, so that saving n files of one name takes linear time.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.numbers: dict[Path, int] = {}  # the last one in use for a name
        self.saved = set[bytes]()  # digests of a name and a content

    def save(self, path: Path, content: bytes, like: Path | None = None) -> None:
        """Write a file, completely or not at all.

        Args:
            path: its name, to which a number may be added.
            content: what to write.
            like: a file whose times and permissions to copy.

        Raises:
            OSError: if it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _digest(path, hashlib.sha256(content).digest())
        while True:
            with self.lock:
                if digest in self.saved:
                    return
                number = self._next_number(path, digest)
                if number is None:
                    return
                self.saved.add(digest)
            try:
                _create(numbered(path, number), content, like)
                return
            except OSError as error:
                with self.lock:
                    self.saved.discard(digest)
                    self.numbers[path] = min(self.numbers[path], number - 1)
                if not isinstance(error, FileExistsError):  # unless another program was quicker
                    raise

    def _next_number(self, path: Path, digest: bytes) -> int | None:
        """Reserve the next free number of a name; None if a file with this digest comes before it."""
        number = self.numbers.get(path, 0) + 1
        while os.path.lexists(taken := numbered(path, number)):
            if taken.is_file():
                with taken.open("rb") as file:
                    self.saved.add(_digest(path, hashlib.file_digest(file, "sha256").digest()))
            self.numbers[path] = number
            if digest in self.saved:
                return None
            number += 1
        self.numbers[path] = number
        return number


def _digest(path: Path, content_sha256: bytes) -> bytes:
    return hashlib.sha256(os.fsencode(path) + content_sha256).digest()[:16]  # shorter, as there may be millions


def numbered(path: Path, number: int) -> Path:
    """A name with a number: photo.jpg, photo_2.jpg; photo.jpg.png, photo.jpg_2.png."""
    if number == 1:
        return path
    stem, inner = os.path.splitext(path.stem) if has_suffix(path.stem) else (path.stem, "")  # noqa: PTH122
    return path.with_name(_shorten(stem, f"{inner}_{number}{path.suffix}"))


def _shorten(stem: str, ending: str) -> str:
    """A stem with this ending, cut to the longest name that a file system takes."""
    while stem and len(os.fsencode(stem + ending)) > MAX_NAME:
        stem = stem[:-1]
    return stem + ending


def _create(path: Path, content: bytes, like: Path | None) -> None:
    """Write a file completely or not at all; FileExistsError if its name is taken."""
    beside = path.with_name(f".{uuid4()}.partial")
    try:
        beside.write_bytes(content)
        if like:
            with suppress(OSError):  # some file systems store neither times nor permissions
                shutil.copystat(like, beside)
        try:
            path.hardlink_to(beside)  # unlike a rename, it never overwrites
        except FileExistsError:
            raise
        except OSError:  # FAT and some network file systems have no hard links
            path.open("xb").close()
            try:
                beside.replace(path)  # overwrites that empty file, which is ours
            except OSError:
                path.unlink()
                raise
    finally:
        beside.unlink(missing_ok=True)


def copy_to(folder: Path, path: Path, verdict: str, files: NewFiles) -> None:
    """Copy a picture into the verdict's folder."""
    files.save(folder / verdict / path.name, path.read_bytes(), like=path)


def overlay_path(folder: Path, path: Path) -> Path:
    """Where a picture's heatmap is saved: in folders like the picture's own.

    A name that would be too long is cut and gets a digest of the whole name.
    """
    inside = [part for part in path.parts if part not in (path.anchor, "..")]
    name = path.name + ".png"
    if len(os.fsencode(name)) > MAX_NAME:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
        ending = f"~{digest}{path.suffix}.png"
        name = _shorten(path.stem, OVERLAY_NUMBER + ending).replace(OVERLAY_NUMBER + ending, ending)
    return Path(folder, *inside[:-1], name)


def save_overlay(classifier: Classifier, folder: Path, path: Path, explanation: Explanation, files: NewFiles) -> None:
    """Save the picture with the heatmap of its own label."""
    picture = open_picture(path)
    files.save(overlay_path(folder, path), overlay_png(classifier, picture, pad_to_picture(explanation, picture)))


def save_failure(error: OSError) -> str:
    """The sentence for a copy or heatmap that is missing."""
    return f"Its copy or heatmap cannot be saved: {error.strerror or error}."


def copy_classified(copies: Path, paths: list[Path], done: dict[str, Row], files: NewFiles) -> int:
    """Copy the pictures that earlier runs classified but did not copy; return how many cannot be copied."""
    failed = 0
    for path in tqdm([path for path in paths if str(path) in done], desc="Copying", unit="picture", leave=False):
        try:
            copy_to(copies, path, done[str(path)].verdict or NOT_SURE, files)
        except OSError as error:
            failed += 1
            tqdm.write(f"{path}: {save_failure(error)}", file=sys.stderr)
    return failed
