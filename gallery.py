"""Many pictures in one session: answers in words, their order, the files to download, and the gallery itself."""

import base64
import html
import json
import math
import re
import time
import unicodedata
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, TypeVar
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import streamlit as st
from PIL import Image
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import UploadedFile

from engine import usable_cores
from gradcam import explain, overlay_png
from images import MAX_MEGABYTES, BadImage, open_picture
from model import MEME, NOT_MEME, NOT_SURE, Classifier, Prediction
from tables import csv_text, row_of

METRICS = Path(__file__).with_name("outputs") / "metrics.json"
MAX_PICTURES = 100  # in one request to the HTTP API
MAX_TOTAL_MEGABYTES = 100  # of originals that one session holds; of older pictures, only the answers stay
MAX_ITEMS = 2000  # answers in one session, each with a thumbnail of some 10 KB
MIN_RIGHT = 0.8  # share of right answers on unseen pictures, below which the words are "Probably …"
THUMBNAIL_SIDE = 300  # pixels; shown at half of that, for dense screens
OVERLAY_SIDE = 800  # pixels; a hundred of them are held in memory at once
MAX_AT_ONCE = 8  # pictures of one session
MAX_NAME = 80  # characters of a picture's own name inside a ZIP
MAX_NAME_BYTES = 200  # of the same; file systems take 255, and a number and a suffix are added

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True, slots=True)
class Item:
    """One uploaded picture and its answer.

    Attributes:
        name: as the browser sent it; untrusted, so never used as markup or as a path.
        answer: the prediction, or what is wrong with the file.
        thumbnail: a small JPEG; None of a file that cannot be read.
        warning: what of the file was not classified, as `open_picture` says it, else empty.
    """

    name: str
    answer: Prediction | BadImage
    thumbnail: bytes | None = None
    warning: str = ""


WORDS = {MEME: "Meme", NOT_MEME: "Not a meme", NOT_SURE: "Not sure", None: "Cannot be read"}
CLASS_NAMES = {MEME: "meme", NOT_MEME: "not a meme"}
ICONS = {MEME: "▲", NOT_MEME: "●", NOT_SURE: "?", None: "✕"}
ALL = "All"
PER_PAGE = 24  # cards
ZIP = "application/zip"
BALANCED = "balanced"
STRICTNESS = {
    "nearly_all": "Find nearly all memes",
    BALANCED: "Balanced",
    "certain": "Only the certain ones",
}

SORT_KEYS: dict[str, Callable[[Prediction, Classifier], float]] = {
    "most like a meme first": lambda prediction, _: -prediction.meme_probability,
    "least like a meme first": lambda prediction, _: prediction.meme_probability,
    "most doubtful first": lambda prediction, classifier: abs(prediction.meme_probability - classifier.threshold),
}


def map_on_free_cores(
    function: Callable[[Input], Output], inputs: Iterable[Input], free_core: AbstractContextManager[object]
) -> Generator[Output, None, None]:
    """Apply a function to each input, on several cores at once, and yield the results in order.

    Closing the generator waits for the calls that have begun, and cancels the others.

    Args:
        function: what to apply.
        inputs: all are taken at once.
        free_core: held during each call.
    """

    def on_a_core(one: Input) -> Output:
        with free_core:
            if closed.is_set():  # while it waited for the core
                raise CancelledError
            return function(one)

    closed = Event()
    pool = ThreadPoolExecutor(min(usable_cores(), MAX_AT_ONCE))
    try:
        yield from pool.map(on_a_core, inputs)  # cancels the calls that have not begun
    finally:
        closed.set()
        pool.shutdown()


def classify_upload(classifier: Classifier, name: str, data: bytes) -> Item:
    """Classify one upload."""
    try:
        picture = open_picture(data)
    except BadImage as error:
        return Item(name, error)
    (prediction,) = classifier.predict([picture])
    return Item(name, prediction, thumbnail(picture), picture.info["warning"])


def thumbnail(picture: Image.Image) -> bytes:
    """A JPEG of at most `THUMBNAIL_SIDE` pixels."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


@cache
def metrics() -> dict[str, Any]:
    """The figures measured on pictures from unseen sources, as `evaluation.evaluate` wrote them."""
    measured: dict[str, Any] = json.loads(METRICS.read_text(encoding="utf-8"))
    return measured


def share_of_memes(probability: float) -> float:
    """The share of memes among the unseen pictures whose probability lies in the same tenth."""
    tenths = [one for one in metrics()["calibration"] if one["n"] and round(10 * one["from"]) <= int(10 * probability)]
    return float(tenths[-1]["value"])


def verdict_in_words(verdict: str, probability: float) -> str:
    """The verdict, with "Probably" where fewer than `MIN_RIGHT` of such answers were right on unseen pictures."""
    share = share_of_memes(probability)
    right = {MEME: share, NOT_MEME: 1 - share}.get(verdict, 1)
    words = WORDS[verdict]
    return words if right >= MIN_RIGHT else f"Probably {'a ' if verdict == MEME else ''}{words[0].lower()}{words[1:]}"


def with_strictness(answer: Prediction, strictness: str, classifier: Classifier) -> Prediction:
    """The same prediction with the verdict of another threshold.

    Args:
        answer: of the checkpoint.
        strictness: a key of `STRICTNESS`; "balanced" is the checkpoint's own verdict.
        classifier: whose band of doubt to use.
    """
    if strictness == BALANCED:
        return answer
    low, high = edges(strictness, classifier)
    if answer.meme_probability >= high:
        return replace(answer, verdict=MEME)
    return replace(answer, verdict=NOT_MEME if low == high or answer.meme_probability <= low else NOT_SURE)


def edges(strictness: str, classifier: Classifier) -> tuple[float, float]:
    """Up to the first probability the verdict is "not a meme", from the second on "meme"."""
    if strictness == BALANCED:
        return classifier.not_sure
    high = metrics()["strictness"][strictness]["threshold"]
    return (min(classifier.not_sure[0], high) if strictness == "certain" else high), high


def keys_over_budget(sizes: dict[str, int]) -> list[str]:
    """The oldest uploads that must go so that the others, in bytes, fit into `MAX_TOTAL_MEGABYTES`."""
    total, over = sum(sizes.values()), []
    for key, size in sizes.items():
        if total <= MAX_TOTAL_MEGABYTES * 1_000_000:
            break
        over.append(key)
        total -= size
    return over


def notes(picture: Image.Image, box: tuple[int, int, int, int] | None) -> Iterator[str]:
    """A sentence for each part of the file that was not classified: missing rows, a border, other frames."""
    if picture.info["warning"]:
        yield picture.info["warning"]
    if box:
        yield border_sentence(picture, box)
    if picture.info["animated"] and not picture.info["frame"]:  # else the warning names the frame
        yield "Only the first frame of this animation was classified."


def border_sentence(picture: Image.Image, box: tuple[int, int, int, int]) -> str:
    """At which sides a border was cropped.

    Args:
        picture: whole.
        box: left, top, right and bottom edge of the part that was classified, in pixels, from `content_box`.
    """
    cut = (box[0], box[1], picture.width - box[2], picture.height - box[3])
    sides = [side for side, pixels in zip(("left", "top", "right", "bottom"), cut, strict=True) if pixels]
    listed = " and ".join([", ".join(sides[:-1]), sides[-1]] if len(sides) > 1 else sides)
    return f"Judged without the plain border at the {listed}: only the outlined part counts."


def error_sentence(name: str, error: BadImage) -> str:
    """The error with the file's name as its subject, or before it."""
    sentence, replaced = re.subn(r"^This (file|picture|JPEG) ", lambda _: f"{name} ", str(error), count=1)
    return sentence if replaced else f"{name}: {sentence}"


def escape_markdown(text: str) -> str:
    """Untrusted text as Markdown that shows it unchanged."""
    one_line = re.sub(r"([\\`*_{}\[\]()<>#+|~:$&!^=-])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^(\d+)\.", r"\1\\.", one_line)  # else the start of a numbered list


def worth_in_words(probability: float) -> str:
    """How many of the unseen pictures with such a probability were memes."""
    memes = round(100 * share_of_memes(probability))
    return f"Of 100 unseen pictures scored like this, {memes} {'was a meme' if memes == 1 else 'were memes'}."


def in_one_sentence(item: Item, correction: str | None) -> str:
    """A picture's answer for a screen reader."""
    if isinstance(item.answer, BadImage):
        return error_sentence(item.name, item.answer)
    if correction:
        return f"{item.name}: {WORDS[correction]}, your verdict"
    words = verdict_in_words(item.answer.verdict, item.answer.meme_probability)
    return f"{item.name}: {words}, probability of a meme {item.answer.meme_probability:.0%}"


def counts_in_words(items: dict[str, Item], corrections: dict[str, str]) -> str:
    """How many pictures have each verdict."""
    counts = count_verdicts(final_verdicts(items, corrections).values())
    return " · ".join(f"{WORDS[verdict]}: {count}" for verdict, count in counts.items())


def count_verdicts(verdicts: Iterable[str | None]) -> dict[str | None, int]:
    """How many pictures have each verdict, in the order of `WORDS`."""
    listed = list(verdicts)
    return {verdict: listed.count(verdict) for verdict in WORDS}


def name_html(name: str) -> str:
    """A name in one line, with an ellipsis in its middle where it does not fit."""
    tail = 10 if len(name) > 16 else 0
    head, end = html.escape(name[: len(name) - tail]), html.escape(name[len(name) - tail :])
    return f'<div class="name" title="{html.escape(name)}"><span>{head}</span><span>{end}</span></div>'


def picture_html(thumbnail: bytes) -> str:
    """A thumbnail inside the page itself: a file of its own could be gone before a browser fetches it."""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(thumbnail).decode()}">'


def card_html(item: Item, correction: str | None) -> str:
    """The thumbnail, verdict and name of one picture."""
    if not isinstance(item.answer, Prediction) or item.thumbnail is None:
        sentence = f'<div class="why">{html.escape(str(item.answer))}</div>'
        return f'{sentence}<div class="verdict unreadable">{ICONS[None]} {WORDS[None]}</div>{name_html(item.name)}'
    verdict = correction or item.answer.verdict
    words = WORDS[verdict] if correction else verdict_in_words(verdict, item.answer.meme_probability)
    note = "by you" if correction else f"{item.answer.meme_probability:.0%}"
    warning = f'<div class="warning" title="{html.escape(item.warning)}">Note</div>' if item.warning else ""
    return (
        f'{picture_html(item.thumbnail)}{warning}<div class="verdict {verdict}">{ICONS[verdict]} {words}'
        f"<small>{note}</small></div>{name_html(item.name)}"
    )


def final_verdicts(items: dict[str, Item], corrections: dict[str, str]) -> dict[str, str | None]:
    """The user's correction of each picture, else the classifier's verdict; None for files that cannot be read."""
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
        corrections: the user's verdicts, by key.
        classifier: which predicted them.
        verdicts: the final verdicts to show; None for files that cannot be read.
        order: one of `SORT_KEYS`, or None for the order of the upload. Files that cannot be read come last.
    """

    def place(key: str) -> float:
        answer = items[key].answer
        return SORT_KEYS[order](answer, classifier) if order and isinstance(answer, Prediction) else float("inf")

    chosen = [key for key, stands in final_verdicts(items, corrections).items() if stands in verdicts]
    return sorted(chosen, key=place) if order else chosen


def table(items: dict[str, Item], corrections: dict[str, str], classifier: Classifier) -> str:
    """All answers as CSV, with the user's correction, the final verdict and a warning in further columns."""
    rows = [row_of(item.name, item.answer, classifier.sha256) for item in items.values()]
    # The byte-order mark is for Excel, which otherwise assumes a legacy encoding.
    final = final_verdicts(items, corrections)
    more = {
        "correction": [corrections.get(key, "") for key in items],
        "final": [final[key] or "" for key in items],
        "warning": [item.warning for item in items.values()],
    }
    return "\ufeff" + csv_text(rows, more)


def sorted_zip(
    uploads: Iterable[tuple[str, bytes]],
    items: dict[str, Item],
    corrections: dict[str, str],
    verdicts: Collection[str] = (MEME, NOT_MEME, NOT_SURE),
) -> bytes:
    """A ZIP of the pictures themselves in `meme/`, `not_meme/` and `not_sure/`, corrections first.

    Args:
        uploads: key and content of each picture.
        items: the answers by key; those without a prediction are left out.
        corrections: by key, `meme` or `not_meme`.
        verdicts: only pictures with one of these final verdicts.
    """
    buffer = BytesIO()
    folders, numbers = final_verdicts(items, corrections), {key: number for number, key in enumerate(items, 1)}
    with ZipFile(buffer, "w", ZIP_STORED) as archive:  # pictures are compressed already
        for key, data in uploads:
            if (folder := folders[key]) in verdicts:
                _add(archive, f"{folder}/{numbers[key]:04}_{safe_name(items[key].name)}", data)
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
        classifier: which predicted them.
        free_core: held while one picture is open.
    """
    numbers = {key: number for number, key in enumerate(items, 1)}

    def painted(upload: tuple[str, bytes]) -> tuple[str, bytes]:
        key, data = upload
        picture = open_picture(data)
        (explanation,) = explain(classifier, [picture])
        picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
        return f"{numbers[key]:04}_{safe_name(items[key].name)}.png", overlay_png(classifier, picture, explanation)

    good = [upload for upload in uploads if isinstance(items[upload[0]].answer, Prediction)]
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_STORED) as archive:
        for name, content in map_on_free_cores(painted, good, free_core):
            _add(archive, name, content)
    return buffer.getvalue()


def _add(archive: ZipFile, name: str, content: bytes) -> None:
    """Add a file without its time: equal archives must be equal bytes, or Streamlit stores each download anew."""
    member = ZipInfo(name)
    member.external_attr = 0o644 << 16  # without it, nobody might read the unpacked file
    archive.writestr(member, content)


def safe_name(name: str) -> str:
    """The last part of an untrusted name, without characters that a file system or a shell may treat specially."""
    plain = unicodedata.normalize("NFC", PurePosixPath(name.replace("\\", "/")).name)
    stem, dot, suffix = re.sub(r"[^\w.-]", "_", plain).lstrip(".").rpartition(".")
    short = (stem or suffix)[:MAX_NAME].encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return f"{short}{dot if stem else ''}{suffix[:8] if stem else ''}" or "picture"


def start_session() -> None:
    """Set the session state that the functions below share."""
    st.session_state["changed"] = False  # what the gallery behind the dialog shows, since the script last ran
    for name in ("items", "corrections", "without_upload", "removed"):
        st.session_state.setdefault(name, {})
    for name in ("order", "review"):
        st.session_state.setdefault(name, [])
    defaults = {"opened": None, "example": None, "generation": 0, "strictness": BALANCED}
    for name, value in defaults.items():
        st.session_state.setdefault(name, value)


def correct(key: str, verdict: str) -> None:
    """Store the user's verdict on a picture."""
    st.session_state["corrections"].pop(key, None)  # so that the latest correction comes last
    st.session_state["corrections"][key] = verdict


def undo(key: str) -> None:
    """Take back the correction of this picture, or else the latest one, and show that picture."""
    corrections: dict[str, str] = st.session_state["corrections"]
    if corrections:
        undone = key if key in corrections else next(reversed(corrections))
        del corrections[undone]
        st.session_state["opened"] = st.session_state["opened"] and undone


def open_item(key: str | None, keys: list[str] | None = None) -> None:
    """Open a picture in the dialog, or close the dialog; `keys` are the pictures to step through."""
    st.session_state["opened"] = key
    st.session_state["review"] = keys or st.session_state["review"]


def remove(keys: list[str], then_open: str | None = None) -> None:
    """Remove pictures, free their memory, and open another one or none."""
    for key in keys:
        _free_upload(key)
        st.session_state["removed"][key] = True  # the browser's uploader still lists it
        for held in ("items", "corrections", "without_upload"):
            st.session_state[held].pop(key, None)
    st.session_state["order"] = [key for key in st.session_state["order"] if key not in keys]
    open_item(then_open)
    st.session_state["changed"] = True


def remove_all() -> None:
    """Remove everything and show the first page again."""
    remove(st.session_state["order"])
    st.session_state["example"] = None
    st.session_state["generation"] += 1  # new, empty uploaders
    st.session_state["removed"] = {}


def _free_upload(key: str) -> None:
    context = get_script_run_ctx()
    if context and isinstance(context.uploaded_file_mgr, MemoryUploadedFileManager):
        context.uploaded_file_mgr.remove_file(context.session_id, key)


def order_uploads(uploaded: list[UploadedFile]) -> dict[str, UploadedFile]:
    """The uploads by key, oldest first. A new one takes the place of an example.

    `order` in the session state also lists the pictures whose answer stays without an upload.
    """
    by_key = {upload.file_id: upload for upload in uploaded if upload.file_id not in st.session_state["removed"]}
    kept = [key for key in st.session_state["order"] if key in by_key or key in st.session_state["without_upload"]]
    new = [key for key in by_key if key not in kept][: MAX_ITEMS - len(kept)]
    if new:
        st.session_state["example"] = None
    st.session_state["order"] = kept + new
    for key in st.session_state["items"].keys() - set(kept):
        del st.session_state["items"][key]
    return {key: by_key[key] for key in kept + new if key in by_key}


def take_refused() -> None:
    """Add the files that client.js did not send, or that did not arrive, as items without a picture."""
    for name, size, reason in st.session_state["client"].refused or []:
        key = f"refused {name} {size}"
        st.session_state["items"][key] = Item(str(name), BadImage(_too_large(int(size)) if size else str(reason)))
        st.session_state["without_upload"][key] = True
        st.session_state["order"] = [*(one for one in st.session_state["order"] if one != key), key]


def _too_large(size: int) -> str:
    return f"This file has {size / 1_000_000:.3g} MB; the limit is {MAX_MEGABYTES} MB."


def release_originals(uploads: dict[str, UploadedFile]) -> None:
    """Free the oldest originals beyond the session's limit; their answers stay."""
    for key in keys_over_budget({key: upload.size for key, upload in uploads.items()}):
        st.session_state["without_upload"][key] = True
        _free_upload(key)
        del uploads[key]


def items_with_strictness(classifier: Classifier) -> dict[str, Item]:
    """All answers in the order of their arrival, at the chosen strictness."""
    items: dict[str, Item] = st.session_state["items"]
    result = {}
    for key in st.session_state["order"]:
        if key in items:
            item = items[key]
            if isinstance(item.answer, Prediction):
                item = replace(item, answer=with_strictness(item.answer, st.session_state["strictness"], classifier))
            result[key] = item
    return result


def classify_uploads(
    uploads: dict[str, UploadedFile],
    classifier: Classifier,
    free_core: AbstractContextManager[object],
    place: DeltaGenerator,
) -> Iterator[str]:
    """Classify the uploads that have no answer yet, and yield their keys; a rerun goes on where it stopped.

    Args:
        uploads: all of them, by key.
        classifier: which classifies them.
        free_core: held while one picture is open.
        place: where to show the progress.
    """
    items: dict[str, Item] = st.session_state["items"]
    new = [key for key in uploads if key not in items]
    if not new:
        return
    bar, started = place.progress(0.0, text=f"Classifying {len(new)} pictures …"), time.monotonic()

    def classify(key: str) -> str:
        # Stored here, because a rerun would lose a returned result.
        items[key] = classify_upload(classifier, uploads[key].name, uploads[key].getvalue())
        return key

    with closing(map_on_free_cores(classify, new, free_core)) as classified:
        for done, key in enumerate(classified, 1):
            left = (time.monotonic() - started) / done * (len(new) - done)
            bar.progress(done / len(new), text=f"{done} of {len(new)} pictures, {left:.0f} s left")
            yield key
    bar.empty()


def choose_strictness() -> None:
    """Let the user choose the threshold, by its measured recall and precision."""
    measured = metrics().get("strictness")
    if not measured:
        return
    st.radio(
        "How strict",
        list(STRICTNESS),
        format_func=STRICTNESS.__getitem__,
        captions=[
            f"finds {measured[key]['recall']['value']:.0%} of memes, right on {measured[key]['precision']['value']:.0%}"
            for key in STRICTNESS
        ],
        horizontal=True,
        help="Measured on pictures from unseen sources: the share of all memes that is found, and the share of "
        "memes among the pictures called so.",
        key="strictness",
    )


def show_gallery(
    uploads: dict[str, UploadedFile],
    classifier: Classifier,
    free_core: AbstractContextManager[object],
    progress: DeltaGenerator,
    show_item: Callable[[str, Item, bytes | None], None],
) -> str:
    """Show counts, cards and downloads, classify what is new, and show the opened picture in a dialog.

    Args:
        uploads: by key; those that do not fit into memory are removed.
        classifier: which classifies them.
        free_core: held while one picture is open.
        progress: where to show the progress.
        show_item: shows one picture in the dialog, from its key, its answer, and its file if that is still there.

    Returns:
        What a screen reader says: the counts once all pictures are classified.
    """
    corrections: dict[str, str] = st.session_state["corrections"]
    items = items_with_strictness(classifier)
    numbers = {key: number for number, key in enumerate(st.session_state["order"], 1)}
    summary = st.empty()
    summary.markdown(f"**{counts_in_words(items, corrections)}**")
    with st.container(horizontal=True, vertical_alignment="center", key="filters"):
        chosen, order = choose_filter(items, corrections)
    choose_strictness()
    wanted = [verdict for verdict, words in WORDS.items() if chosen in (ALL, words)]
    shown = sort_items(items, corrections, classifier, wanted, order)
    cards = st.container(key="cards")
    for key in choose_page(shown, f"page-{chosen}-{order}"):
        show_card(cards, numbers[key], items[key], corrections.get(key), partial(open_item, key, shown))
    for key in classify_uploads(uploads, classifier, free_core, progress):
        items = items_with_strictness(classifier)
        summary.markdown(f"**{counts_in_words(items, corrections)}**")
        shown.append(key)
        if chosen == ALL and not order and len(shown) <= PER_PAGE:
            show_card(cards, numbers[key], items[key], None, partial(open_item, key, shown))
        if len(items) == len(numbers):
            st.rerun()
    if not shown:
        st.caption("None of the pictures.")
    release_originals(uploads)
    show_downloads(items, uploads, classifier, free_core)
    if st.session_state["opened"] in items:
        in_dialog = st.dialog("Review", width="large", on_dismiss=partial(open_item, None))
        in_dialog(show_review)(items, uploads, show_item, summary)
    return f"{len(items)} pictures classified. {counts_in_words(items, corrections)}"


def choose_filter(items: dict[str, Item], corrections: dict[str, str]) -> tuple[str, str | None]:
    """Which verdict to show, in words or `ALL`, and one of `SORT_KEYS` or None."""
    counts = count_verdicts(final_verdicts(items, corrections).values())
    labels = {ALL: f"{ALL} {len(items)}"} | {WORDS[verdict]: f"{WORDS[verdict]} {n}" for verdict, n in counts.items()}
    chosen = st.pills(
        "Show",
        list(labels),
        format_func=labels.__getitem__,
        default=ALL,
        required=True,
        wrap=True,
        label_visibility="collapsed",
        key="filter",
    )
    order = st.selectbox(
        "Order", list(SORT_KEYS), index=None, placeholder="Order: as uploaded", width=220, label_visibility="collapsed"
    )
    return chosen, order


def choose_page(keys: list[str], widget_key: str) -> list[str]:
    """The keys on the chosen page; each combination of filter and order, with a widget of its own, starts on page 1."""
    pages = max(1, math.ceil(len(keys) / PER_PAGE))
    if st.session_state.get(widget_key, 1) > pages:  # a correction has emptied the last one
        st.session_state[widget_key] = pages
    page = st.pagination(pages, key=widget_key) if pages > 1 else 1
    return keys[(page - 1) * PER_PAGE : page * PER_PAGE]


def show_card(
    place: DeltaGenerator, number: int, item: Item, correction: str | None, on_click: Callable[[], None]
) -> None:
    """A small picture with its answer; its button covers the card."""
    with place.container(key=f"item-{number}"):
        st.html(card_html(item, correction))
        st.button(f"Open {number}", key=f"open-{number}", on_click=on_click)


def show_downloads(
    items: dict[str, Item],
    uploads: dict[str, UploadedFile],
    classifier: Classifier,
    free_core: AbstractContextManager[object],
) -> None:
    """Buttons for the table and the archives, which are made on a click."""
    corrections: dict[str, str] = st.session_state["corrections"]
    held = [(key, uploads[key].getvalue()) for key in items if key in uploads]
    downloads: tuple[tuple[str, str, str, Callable[[], str | bytes]], ...] = (
        ("Table (CSV)", "memes.csv", "text/csv", lambda: table(items, corrections, classifier)),
        ("Only the memes (ZIP)", "only-memes.zip", ZIP, lambda: sorted_zip(held, items, corrections, (MEME,))),
        ("Pictures, sorted (ZIP)", "pictures.zip", ZIP, lambda: sorted_zip(held, items, corrections)),
        ("Heatmaps (ZIP)", "heatmaps.zip", ZIP, lambda: overlays(held, items, classifier, free_core)),
    )
    with st.container(horizontal=True):
        for label, name, mime, make in downloads:
            st.download_button(label, make, file_name=name, mime=mime, on_click="ignore", icon=":material/download:")
    released = sum(isinstance(item.answer, Prediction) and key not in uploads for key, item in items.items())
    if released:
        st.caption(f"The ZIPs lack the {released} oldest pictures, which made room; the table has all {len(items)}.")


def show_review(
    items: dict[str, Item],
    uploads: dict[str, UploadedFile],
    show_item: Callable[[str, Item, bytes | None], None],
    summary: DeltaGenerator,
) -> None:
    """In a dialog: step through the pictures and correct verdicts.

    Most clicks draw only the dialog anew, because Streamlit closes and opens it again when the whole script runs. The
    cards behind it follow when it is closed.
    """
    if st.session_state["changed"]:
        st.rerun()
    summary.markdown(f"**{counts_in_words(items, st.session_state['corrections'])}**")
    opened: str = st.session_state["opened"]
    keys = [key for key in st.session_state["review"] if key in items]
    here = keys.index(opened) if opened in keys else 0
    before, after = keys[:here], keys[here + 1 :]
    final = final_verdicts(items, st.session_state["corrections"])
    steps = (
        ("Previous", "Left", next(reversed(before), None)),
        ("Next", "Right", next(iter(after), None)),
        ("Next doubtful", "D", next((key for key in after + before if final[key] == NOT_SURE), None)),
    )
    with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", key="review-steps"):
        for label, shortcut, key in steps:
            st.button(label, shortcut=shortcut, disabled=key is None, on_click=open_item, args=(key,))
        st.caption(f"{here + 1} of {len(keys)}", width="content")
        following = next(iter(after + before[::-1]), None)
        st.button("Remove", help="Remove this picture", on_click=remove, args=([opened], following), key="remove")
    show_item(opened, items[opened], uploads[opened].getvalue() if opened in uploads else None)
