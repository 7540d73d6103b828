"""XMP sidecars: small files beside pictures, in which photo libraries keep ratings, keywords and edits."""

import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from uuid import uuid4

from tqdm import tqdm

from model import NOT_SURE
from photo_library import DEFAULT_TAG, STYLES
from photo_library.xmp import BadSidecar, Tag, merge_tag, remove_tag, tagged_picture
from tables import Row

MAX_MEGABYTES = 50  # darktable's edits with many masks take a few
ATTEMPTS = 3  # to write a sidecar that another program changes at the same time


@dataclass(frozen=True, slots=True)
class Sidecars:
    """Writes verdicts into the sidecars of pictures. Threads may share it.

    Attributes:
        root: levels of the hierarchy above the verdict's keyword.
        style: one of `STYLES`: `extension` for cat.jpg.xmp, `lightroom` for cat.xmp.
        only: write this verdict only; None for all. Our tag is removed from pictures with another verdict.
        lock: held while a sidecar is written, because two pictures can share one in Lightroom's style.
    """

    root: tuple[str, ...] = (DEFAULT_TAG,)
    style: str = STYLES[0]
    only: str | None = None
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def write(self, picture: Path, verdict: str, meme_probability: float, checkpoint: str) -> None:
        """Write a verdict, or remove an earlier one if `only` excludes this one.

        Args:
            picture: its path; it is not opened.
            verdict: as in `Prediction`.
            meme_probability: likewise.
            checkpoint: SHA-256 of the checkpoint, in hexadecimal.

        Raises:
            BadSidecar: if the existing sidecar cannot be used; the text completes "Its sidecar NAME …".
            OSError: if it cannot be read or written.
        """
        sidecar = sidecar_path(picture, self.style)
        name = picture.name if self.style == "lightroom" else None
        if self.only not in (None, verdict):
            with self.lock:
                remove_from(sidecar, picture.name)
            return
        tag = Tag(verdict, meme_probability, checkpoint, self.root, name)

        def merged(data: bytes | None) -> bytes:
            if name and data and (other := other_picture(data, sidecar, name)):
                raise BadSidecar(f"has the verdict of {other}; without --xmp-style lightroom, each has its own")
            return merge_tag(data, tag)

        with self.lock:
            update_file(sidecar, merged)

    def try_write(self, picture: Path, verdict: str, meme_probability: float, checkpoint: str) -> str | None:
        """Like `write`, but return the error as one sentence."""
        try:
            self.write(picture, verdict, meme_probability, checkpoint)
        except (BadSidecar, OSError) as error:
            return sidecar_failure(sidecar_path(picture, self.style), error)
        return None

    def write_classified(self, pictures: list[Path], done: dict[str, Row], checkpoint: str) -> int:
        """Write the sidecars that earlier runs did not write; return how many cannot be written.

        Args:
            pictures: to write sidecars for.
            done: rows of those that earlier runs classified, by their paths.
            checkpoint: SHA-256 of the checkpoint, in hexadecimal.
        """
        failed = 0
        answered = [picture for picture in pictures if str(picture) in done]
        for picture in tqdm(answered, desc="Sidecars", unit="picture", leave=False):
            row = done[str(picture)]
            failure = self.try_write(picture, row.verdict or NOT_SURE, row.meme_probability or 0.0, checkpoint)
            if failure:
                failed += 1
                tqdm.write(f"{picture}: {failure}", file=sys.stderr)
        return failed


def sidecar_path(picture: Path, style: str) -> Path:
    """The path of a picture's sidecar. One that exists with the ending .XMP alone is used, too."""
    stem = picture.stem if style == "lightroom" else picture.name
    lower, upper = (picture.with_name(f"{stem}{ending}") for ending in (".xmp", ".XMP"))
    return upper if os.path.lexists(upper) and not os.path.lexists(lower) else lower


def remove_tags(picture: Path) -> int:
    """Remove our tags from a picture's sidecars of both styles; return how many held some.

    Raises:
        BadSidecar: if an existing sidecar cannot be used; the text is a whole sentence.
    """
    changed = 0
    for style in STYLES:
        sidecar = sidecar_path(picture, style)
        try:
            changed += remove_from(sidecar, picture.name)
        except (BadSidecar, OSError) as error:
            raise BadSidecar(sidecar_failure(sidecar, error)) from error
    return changed


def remove_all_tags(pictures: list[Path]) -> tuple[int, int]:
    """Remove our tags from the sidecars of many pictures.

    Returns:
        How many sidecars held some, and how many pictures have a sidecar that cannot be used.
    """
    changed = failed = 0
    for picture in tqdm(pictures, unit="picture"):
        try:
            changed += remove_tags(picture)
        except BadSidecar as error:
            failed += 1
            tqdm.write(f"{picture}: {error}", file=sys.stderr)
    return changed, failed


def remove_from(sidecar: Path, name: str) -> bool:
    """Remove our tags from a sidecar unless they are another picture's; return whether there were any."""

    def removed(data: bytes | None) -> bytes | None:
        return data if data is None or other_picture(data, sidecar, name) else remove_tag(data)

    return update_file(sidecar, removed)


def other_picture(data: bytes, sidecar: Path, name: str) -> str | None:
    """The name of another picture whose verdict the sidecar holds, if that picture still exists."""
    tagged = tagged_picture(data)
    return tagged if tagged not in (None, name) and sidecar.with_name(Path(tagged).name).exists() else None


def sidecar_failure(sidecar: Path, error: BadSidecar | OSError) -> str:
    """The sentence about a sidecar that could not be used."""
    reason = f"cannot be written: {error.strerror or error}" if isinstance(error, OSError) else str(error)
    return f"Its sidecar {sidecar.name} {reason}."


def update_file(path: Path, change: Callable[[bytes | None], bytes | None]) -> bool:
    """Replace a file's content atomically. A file whose content stays the same is not touched.

    A link is followed. The file keeps its permissions and, where this is allowed, its owner.

    Args:
        path: of the file, which need not exist.
        change: makes the new content from the old; None stands for no file.

    Returns:
        Whether anything was changed.

    Raises:
        BadSidecar: if there is something that is not a file or must not be changed.
        OSError: if it cannot be read or written.
    """
    for _ in range(ATTEMPTS):
        before = _status(path)
        old = Path(path).read_bytes() if before else None
        new = change(old)
        if new == old:
            return False
        if before and not before.st_mode & 0o222:
            raise BadSidecar("is read-only and was left alone")
        if _replace(path, new, before):
            return True
    raise BadSidecar("is being changed by another program and was left alone")


def _status(path: Path) -> os.stat_result | None:
    """The status of a file that is to be read; None if it does not exist."""
    if not os.path.lexists(path):
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        raise BadSidecar("is a link to a file that does not exist") from None
    if not stat.S_ISREG(status.st_mode):
        raise BadSidecar("is not a file")
    if status.st_size > MAX_MEGABYTES * 1_000_000:
        raise BadSidecar(f"has more than {MAX_MEGABYTES} MB and was left alone")
    return status


def _replace(path: Path, content: bytes | None, before: os.stat_result | None) -> bool:
    """Write a temporary file and rename it over the old one; return False if that has changed meanwhile."""
    real = Path(os.path.realpath(path))
    if content is None:
        path.unlink()
        if path != real:
            real.unlink(missing_ok=True)
        return True
    beside = real.with_name(f".{uuid4()}.partial")
    try:
        with beside.open("xb") as file:
            file.write(content)
            if before:  # it holds other programs' work, which must survive a power cut
                file.flush()
                os.fsync(file.fileno())
        if before:
            _copy_permissions(beside, before)
        now = _status(path)
        if (now and (now.st_mtime_ns, now.st_size)) != (before and (before.st_mtime_ns, before.st_size)):
            return False
        beside.replace(real)
        return True
    finally:
        beside.unlink(missing_ok=True)


def _copy_permissions(path: Path, like: os.stat_result) -> None:
    with suppress(OSError, AttributeError):  # only root may give files away; Windows has no such call
        os.chown(path, like.st_uid, like.st_gid)
    path.chmod(stat.S_IMODE(like.st_mode))
