"""Many pictures of one visitor: their answers, in what order to show them, and what to take home."""

import re
import unicodedata
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import PurePosixPath
from threading import Event
from typing import TypeVar
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from engine import usable_cores
from gradcam import explain, overlay_png
from images import BadImage, open_picture
from model import Classifier, Prediction
from tables import csv_text, row_of

MAX_PICTURES = 100
MAX_TOTAL_MEGABYTES = 100
THUMBNAIL_SIDE = 300  # pixels; shown at half of that, for dense screens
OVERLAY_SIDE = 800  # pixels; a hundred of them are held in memory at once
MAX_AT_ONCE = 8  # of one visitor's pictures
MAX_NAME = 80  # characters of a picture's own name inside a ZIP
MAX_NAME_BYTES = 200  # of the same; file systems take 255, and a number and a suffix are added

Thing = TypeVar("Thing")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Item:
    """One uploaded picture and its answer.

    Attributes:
        name: as the visitor's computer has it: data, never markup or a path.
        answer: the prediction, or what is wrong with the file.
        thumbnail: a small JPEG; None of a file that cannot be read.
    """

    name: str
    answer: Prediction | BadImage
    thumbnail: bytes | None


SORT_KEYS: dict[str, Callable[[Prediction, Classifier], float]] = {
    "most like a meme first": lambda prediction, _: -prediction.meme_probability,
    "least like a meme first": lambda prediction, _: prediction.meme_probability,
    "most doubtful first": lambda prediction, classifier: abs(prediction.meme_probability - classifier.threshold),
}


def map_on_free_cores(
    work: Callable[[Thing], Result], things: Iterable[Thing], free_core: AbstractContextManager[object]
) -> Generator[Result, None, None]:
    """Do some work on each of a visitor's things, on several cores at once, and give the results in their order.

    Closing the iterator waits for what has begun; the rest is never done.

    Args:
        work: what to do.
        things: all are taken at once.
        free_core: held while the work on one thing is done.
    """

    def on_a_core(thing: Thing) -> Result:
        with free_core:
            if closed.is_set():  # while it waited for the core
                raise CancelledError
            return work(thing)

    closed = Event()
    pool = ThreadPoolExecutor(min(usable_cores(), MAX_AT_ONCE))
    try:
        yield from pool.map(on_a_core, things)  # which cancels what has not begun
    finally:
        closed.set()
        pool.shutdown()


def classify_upload(classifier: Classifier, name: str, data: bytes) -> Item:
    """Answer one upload."""
    try:
        picture = open_picture(data)
    except BadImage as error:
        return Item(name, error, None)
    (prediction,) = classifier.predict([picture])
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return Item(name, prediction, buffer.getvalue())


def count_within_limits(sizes: list[int]) -> int:
    """How many of the first files, of these sizes in bytes, one visitor may have open at once."""
    total = 0
    for number, size in enumerate(sizes[:MAX_PICTURES]):
        total += size
        if total > MAX_TOTAL_MEGABYTES * 1_000_000:
            return number
    return min(len(sizes), MAX_PICTURES)


def final_verdicts(items: dict[str, Item], corrections: dict[str, str]) -> dict[str, str | None]:
    """What each picture counts as: the visitor's own verdict, else ours; None for what cannot be read."""
    return {
        key: corrections.get(key, item.answer.verdict) if isinstance(item.answer, Prediction) else None
        for key, item in items.items()
    }


def sort_items(
    items: dict[str, Item],
    corrections: dict[str, str],
    classifier: Classifier,
    verdicts: Collection[str | None],
    order: str | None,
) -> list[str]:
    """The keys of the items to show.

    Args:
        items: all of them, in the order of their upload.
        corrections: the visitor's own verdicts, by key.
        classifier: whose answers they have.
        verdicts: show only what counts as one of these; None is what cannot be read.
        order: one of `SORT_KEYS`, or None for the order of the upload. What cannot be read comes last.
    """

    def place(key: str) -> float:
        answer = items[key].answer
        return SORT_KEYS[order](answer, classifier) if order and isinstance(answer, Prediction) else float("inf")

    chosen = [key for key, stands in final_verdicts(items, corrections).items() if stands in verdicts]
    return sorted(chosen, key=place) if order else chosen


def table(items: dict[str, Item], corrections: dict[str, str], classifier: Classifier) -> str:
    """All answers as CSV, with what the visitor said instead in a column of its own."""
    rows = [row_of(item.name, item.answer, classifier.sha256) for item in items.values()]
    # The byte-order mark is for Excel, which else reads names in an old encoding of the visitor's country.
    return "\ufeff" + csv_text(rows, {"correction": [corrections.get(key, "") for key in items]})


def sorted_zip(uploads: Iterable[tuple[str, bytes]], items: dict[str, Item], corrections: dict[str, str]) -> bytes:
    """A ZIP of the pictures themselves in `meme/`, `not_meme/` and `not_sure/`, corrections first.

    Args:
        uploads: key and content of each picture.
        items: the answers by key; those without a prediction are left out.
        corrections: by key, `meme` or `not_meme`.
    """
    buffer = BytesIO()
    folders = final_verdicts(items, corrections)
    with ZipFile(buffer, "w", ZIP_STORED) as archive:  # pictures are compressed already
        for number, (key, data) in enumerate(uploads, 1):
            if folder := folders[key]:
                _add(archive, f"{folder}/{number:04}_{safe_name(items[key].name)}", data)
    return buffer.getvalue()


def overlays(
    uploads: Iterable[tuple[str, bytes]],
    items: dict[str, Item],
    classifier: Classifier,
    free_core: AbstractContextManager[object],
) -> bytes:
    """A ZIP of every picture, at most `OVERLAY_SIDE` pixels long, under the Grad-CAM of its own answer.

    Args:
        uploads: key and content of each picture.
        items: the answers by key; those without a prediction are left out.
        classifier: whose answers they are.
        free_core: held while one picture is open.
    """

    def painted(upload: tuple[int, tuple[str, bytes]]) -> tuple[str, bytes]:
        number, (key, data) = upload
        picture = open_picture(data)
        (explanation,) = explain(classifier, [picture])
        picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
        return f"{number:04}_{safe_name(items[key].name)}.png", overlay_png(classifier, picture, explanation)

    good = [upload for upload in enumerate(uploads, 1) if isinstance(items[upload[1][0]].answer, Prediction)]
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as archive:
        for name, content in map_on_free_cores(painted, good, free_core):
            _add(archive, name, content)
    return buffer.getvalue()


def _add(archive: ZipFile, name: str, content: bytes) -> None:
    """Without the time, by which Streamlit would keep a second download of the same as another file."""
    member = ZipInfo(name)
    member.external_attr = 0o644 << 16  # without it, nobody might read the unpacked file
    archive.writestr(member, content)


def safe_name(name: str) -> str:
    """The last part of a name from a stranger, without anything that a file system could take amiss."""
    plain = unicodedata.normalize("NFC", PurePosixPath(name.replace("\\", "/")).name)
    stem, dot, suffix = re.sub(r"[^\w.-]", "_", plain).lstrip(".").rpartition(".")
    short = (stem or suffix)[:MAX_NAME].encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return f"{short}{dot if stem else ''}{suffix[:8] if stem else ''}" or "picture"
