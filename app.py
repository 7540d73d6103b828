"""The page: streamlit run app.py"""

import base64
import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import streamlit as st
import torch
from numpy.typing import NDArray
from PIL import Image
from streamlit.delta_generator import DeltaGenerator
from streamlit.runtime.uploaded_file_manager import UploadedFile

from borders import content_box
from engine import BadEngine, load_for_page
from gallery import (
    MAX_NAME,
    MAX_PICTURES,
    MAX_TOTAL_MEGABYTES,
    SORT_KEYS,
    Item,
    classify_upload,
    count_within_limits,
    final_verdicts,
    map_on_free_cores,
    overlays,
    sort_items,
    sorted_zip,
    table,
)
from gradcam import (
    GRAD_CAM,
    METHODS,
    OCCLUSION,
    OPACITY,
    Explanation,
    FaithfulnessCheck,
    check_faithfulness,
    encode_png,
    explain,
    legend,
    overlay,
)
from images import FORMAT_NAMES, MAX_MEGABYTES, SUFFIXES, BadImage, open_picture
from model import MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier, Prediction
from sessions import core_semaphore, release_session_when_closed

HERE = Path(__file__).parent
EXAMPLES = {path.stem.replace("_", " ").capitalize(): path for path in sorted((HERE / "examples").glob("*.jpg"))}
# The words carry the verdict; the colour only repeats it.
VERDICTS = {MEME: ":orange[Meme]", NOT_MEME: ":blue[Not a meme]", NOT_SURE: "Not sure"}
# From which heat on the strongest place is called what; the legend's colours change there.
STRENGTHS = ((0.87, "strong"), (0.6, "moderate"), (0.02, "weak"), (0, "none"))
COLOURS = {
    "jet": "No colour: no evidence · blue and green: weak · yellow and orange: moderate · red: strong.",
    "viridis": "No colour: no evidence · purple to teal: weak · green: moderate · yellow: strong.",
}
ABOUT_FILES = f"{FORMAT_NAMES}, up to {MAX_MEGABYTES} MB each."
EVIDENCE = {MEME: "for a meme", NOT_MEME: "against a meme"}
PLAIN_VERDICTS = {MEME: "Meme", NOT_MEME: "Not a meme", NOT_SURE: "Not sure"}
COUNTED = PLAIN_VERDICTS | {None: "Cannot be read"}
ALL = "All"
PER_PAGE = 20  # small pictures; each is held by the server until the visitor leaves
CLASS_NAMES = {MEME: "meme", NOT_MEME: "not a meme"}
ABOUT_METHODS = """
**Grad-CAM**: the evidence that adds up to the answer, in large cells. **Grad-CAM++**: weighs several separate
places more evenly. **HiResCAM**, **LayerCAM**: smaller cells, from earlier in the network, so less of the whole
reasoning. **Occlusion**: hides one square after another and sees what becomes of the probability; takes longer.
"""
ABOUT_TEST = (
    "Hides the strongest part of the heatmap and asks the network again. Where the heatmap is right, the probability "
    "falls; without the weakest part it stays about the same."
)


@st.cache_resource(show_spinner="Loading the network …")
def load_classifier() -> Classifier:
    # Visitors' own threads keep the cores busy; more threads inside one answer only fight over them.
    torch.set_num_threads(1)
    return load_for_page()


@contextmanager
def acquire_core() -> Iterator[None]:
    """Take a core; whoever has to wait for one reads so."""
    cores = core_semaphore()
    taken = cores.acquire(blocking=False)
    try:  # from here on, for Streamlit may end a script at any of its own lines
        if not taken:
            with st.spinner("Other visitors' pictures are being looked at; yours is waiting …"):
                taken = cores.acquire()
        yield
    finally:
        if taken:
            cores.release()


@st.cache_resource
def page_icon() -> Image.Image:
    """A corner of the background; for a Material icon, each visitor's browser would ask a third party."""
    return Image.open(HERE / "background.png").crop((1520, 80, 1760, 320))


@st.cache_resource
def background_css() -> str:
    """The background as a rule of its own.

    A picture beside the script has no address to be fetched from. Streamlit sends an unchanged
    message this long once per visit and only its hash on later reruns.
    """
    encoded = base64.b64encode((HERE / "background.png").read_bytes()).decode()
    return f"<style>:root {{ --background: url(data:image/png;base64,{encoded}) }}</style>"


@st.cache_data(max_entries=16, show_spinner="Looking at the picture …")
def answer(data: bytes) -> tuple[Image.Image, Explanation]:
    with acquire_core():
        picture = open_picture(data)
        return picture, explain(load_classifier(), [picture])[0]


@st.cache_data(max_entries=64, show_spinner="Looking again …")
def cached_heat(method: str, data: bytes) -> dict[str, NDArray[np.float32]]:
    picture, explanation = answer(data)
    if method == GRAD_CAM:
        return explanation.heat
    with acquire_core():
        return explain(load_classifier(), [picture], method)[0].heat


@st.cache_data(max_entries=16, show_spinner="Hiding what the heatmap marks …")
def cached_check(method: str, shown: str, data: bytes) -> FaithfulnessCheck:
    picture, _ = answer(data)  # before a core is taken: it may have to take one itself
    heat = cached_heat(method, data)[shown]
    with acquire_core():
        return check_faithfulness(load_classifier(), picture, heat)


def in_words(checked: FaithfulnessCheck, shown: str, before: float) -> str:
    """What became of the probability of the class whose evidence is shown."""

    def fall(meme_probability: float) -> str:
        towards = [p if shown == MEME else 1 - p for p in (before, meme_probability)]
        return " → ".join(f"{probability:.0%}" for probability in towards)

    return (
        f"Without the strongest {checked.masked_share:.0%} of the heatmap (blurred): "
        f"{CLASS_NAMES[shown]} **{fall(checked.blurred)}**. "
        f"With that part in the picture's mean colour: {fall(checked.mean_colour)}. "
        f"With the weakest {checked.masked_share:.0%} blurred instead: {fall(checked.control)}."
    )


@st.fragment
def show_answer(data: bytes, picture: Image.Image, explanation: Explanation, place: str) -> None:
    """The answer and its heatmap; the controls in here redraw it without classifying again."""
    st.header(VERDICTS[explanation.prediction.verdict], anchor=False)
    probability = explanation.prediction.meme_probability
    st.progress(probability, text=f"Probability that this is a meme: {probability:.0%}")
    low, high = load_classifier().not_sure
    st.caption(f"Up to {low:.0%}: not a meme · in between: not sure · from {high:.0%} on: meme.")
    if explanation.prediction.verdict == NOT_SURE:
        st.caption("Pictures with a probability like this one are often misjudged, so decide for yourself.")
    if picture.info.get("animated"):
        st.caption("This picture is animated; its first frame was judged.")
    if content_box(picture):
        st.caption("It was judged without the plain bars at its edge.")

    evidence_key, picture_key = f"{place}-evidence", f"{place}-picture"
    sha256 = hashlib.sha256(data).hexdigest()
    # A new picture starts with the evidence for its own answer. (A key for each picture would do that, too, but
    # Streamlit remembers every key that it saw until the visit ends.)
    if st.session_state.get(picture_key) != sha256 or evidence_key not in st.session_state:
        st.session_state[picture_key] = sha256
        st.session_state[evidence_key] = explanation.prediction.label

    left, right = st.columns(2)
    scale = st.container()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.segmented_control(
            "Show the evidence", list(EVIDENCE), format_func=EVIDENCE.__getitem__, required=True, key=evidence_key
        )
        # The next picture in the dialog is to look the same.
        method = st.selectbox(
            "Method", [*METHODS, OCCLUSION], help=ABOUT_METHODS, width=180, key=f"{place}-method", persist_state="page"
        )
        colour_map = st.segmented_control(
            "Colours",
            list(COLOURS),
            format_func=str.capitalize,
            default="jet",
            required=True,
            key=f"{place}-colours",
            persist_state="page",
        )
        opacity = st.slider(
            "Opacity of the heatmap",
            0,
            100,
            round(100 * OPACITY),
            step=5,
            format="%d %%",
            width=220,
            key=f"{place}-opacity",
            persist_state="page",
        )
        test = st.toggle("Test the heatmap", help=ABOUT_TEST, key=f"{place}-test")
        download = st.container(width="content")

    shown = chosen or explanation.prediction.label
    heat = (explanation.heat if method == GRAD_CAM else cached_heat(method, data))[shown]
    heatmap = overlay(picture, heat, opacity / 100, colour_map)

    def heatmap_file() -> bytes:
        """What is shown, as a PNG of the picture's own size."""
        with core_semaphore():
            painted = overlay(open_picture(data, whole=True), heat, opacity / 100, colour_map)
            return encode_png(painted, load_classifier(), explanation.prediction, shown, method)

    strength = next(words for least, words in STRENGTHS if heat.max() >= least)
    found = f"Evidence {EVIDENCE[shown]}: {strength}"
    if test and heat.any():
        checked = cached_check(method, shown, data)
        hidden = f"Your picture without the strongest {checked.masked_share:.0%}"
        left.image(checked.masked_picture, caption=hidden, alt=hidden, width="stretch")
        scale.write(in_words(checked, shown, probability))
    else:
        left.image(picture, caption="Your picture", alt="The picture as it was judged", width="stretch")
        if test:
            scale.write("This heatmap marks nothing, so there is nothing to hide.")
    right.image(heatmap, caption=found, alt=f"The same picture under its heatmap. {found}", width="stretch")
    scale.image(legend(colour_map), alt=f"Colour scale. {COLOURS[colour_map]}")
    scale.caption(COLOURS[colour_map])
    download.download_button(
        "Download the heatmap",
        heatmap_file,
        file_name="heatmap.png",
        mime="image/png",
        on_click="ignore",
        icon=":material/download:",
        key=f"{place}-download",
    )


def show(data: bytes, place: str, name: str = "") -> None:
    above = st.empty()  # always there: else the old answer would stay for a moment below the new one
    if name:
        above.text(name[-MAX_NAME:])
    try:
        show_answer(data, *answer(data), place)
    except BadImage as error:
        st.error(str(error), icon=":material/broken_image:")


def open_item(key: str | None) -> None:
    """Have a picture of the gallery open from now on, or none; an upload that arrives does not close it."""
    st.session_state["opened"] = key


def show_opened(key: str, name: str, data: bytes) -> None:
    """In a dialog."""
    show(data, "dialog", name)
    st.segmented_control(
        "Your own verdict, for the table and the sorted pictures",
        list(CLASS_NAMES),
        format_func=CLASS_NAMES.__getitem__,
        default=st.session_state["corrections"].get(key),
        key=f"correction-{key}",
        on_change=correct,  # unlike the lines below a widget, it runs even if the dialog is closed at once
        args=(key,),
    )


def correct(key: str) -> None:
    corrections: dict[str, str] = st.session_state["corrections"]
    corrections.pop(key, None)
    if chosen := st.session_state[f"correction-{key}"]:
        corrections[key] = chosen


def order_uploads(uploaded: list[UploadedFile]) -> dict[str, UploadedFile]:
    """The uploads by their keys, the newest last. A new one takes the place of an example."""
    by_key = {upload.file_id: upload for upload in uploaded}
    earlier = [key for key in st.session_state.get("came", []) if key in by_key]
    new = [key for key in by_key if key not in earlier]
    if new:
        st.session_state["example"] = None
    st.session_state["came"] = earlier + new
    return {key: by_key[key] for key in earlier + new}


def classify_uploads(uploads: dict[str, UploadedFile], place: DeltaGenerator) -> dict[str, Item]:
    """Answer the uploads that have no answer yet; a rerun in between goes on where it stopped.

    Args:
        uploads: all of them, by key.
        place: where to say how far this is.
    """
    items: dict[str, Item] = st.session_state.setdefault("items", {})
    for key in items.keys() - uploads.keys():
        del items[key]
    new = [key for key in uploads if key not in items]
    before = len(items)
    if len(new) > 1:
        bar, started = place.progress(0.0, text="Looking at the pictures …"), time.monotonic()
    classifier = load_classifier()

    def look_at(key: str) -> None:
        items[key] = classify_upload(
            classifier, uploads[key].name, uploads[key].getvalue()
        )  # a rerun would lose a result

    with closing(map_on_free_cores(look_at, new, core_semaphore())) as looked:
        for _ in looked:
            if len(new) > 1:
                done = len(items)
                left = (time.monotonic() - started) / (done - before) * (len(uploads) - done)
                bar.progress(done / len(uploads), text=f"{done} of {len(uploads)} pictures, {left:.0f} s left")
    if len(new) > 1:
        bar.empty()
    return {key: items[key] for key in uploads}


def show_gallery(items: dict[str, Item], uploads: dict[str, UploadedFile]) -> None:
    corrections: dict[str, str] = st.session_state["corrections"]
    verdicts = list(final_verdicts(items, corrections).values())
    st.subheader("All pictures", anchor=False)
    st.write(" · ".join(f"{words}: {verdicts.count(verdict)}" for verdict, words in COUNTED.items()))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.pills("Show", [ALL, *COUNTED.values()], default=ALL, required=True, wrap=True)
        order = st.selectbox("Order", list(SORT_KEYS), index=None, placeholder="as uploaded", width=240)
    wanted = [verdict for verdict, words in COUNTED.items() if chosen in (ALL, words)]
    shown = sort_items(items, corrections, load_classifier(), wanted, order)
    pages = max(1, math.ceil(len(shown) / PER_PAGE))
    page_key = f"page-{chosen}-{order}"  # each begins with its first
    if st.session_state.get(page_key, 1) > pages:  # a correction has emptied the last one
        st.session_state[page_key] = pages
    page = st.pagination(pages, key=page_key) if pages > 1 else 1
    numbers = {key: number for number, key in enumerate(items, 1)}  # as in the ZIPs
    if not shown:
        st.caption("None of the pictures.")
    with st.container(horizontal=True):
        for key in shown[(page - 1) * PER_PAGE : page * PER_PAGE]:
            with st.container(width=184, border=True, gap="xsmall", key=f"item-{key}"):
                show_item(numbers[key], key, items[key], corrections.get(key))

    with st.container(horizontal=True):
        for label, name, mime, make in (
            ("Table (CSV)", "memes.csv", "text/csv", lambda: table(items, corrections, load_classifier())),
            (
                "Pictures, sorted (ZIP)",
                "pictures.zip",
                "application/zip",
                lambda: sorted_zip(contents(uploads), items, corrections),
            ),
            (
                "Heatmaps (ZIP)",
                "heatmaps.zip",
                "application/zip",
                lambda: overlays(contents(uploads), items, load_classifier(), core_semaphore()),
            ),
        ):
            st.download_button(label, make, file_name=name, mime=mime, on_click="ignore", icon=":material/download:")

    if (opened := st.session_state.get("opened")) in items:
        in_dialog = st.dialog(f"Picture {numbers[opened]}", width="large", on_dismiss=lambda: open_item(None))
        in_dialog(show_opened)(opened, items[opened].name, uploads[opened].getvalue())


def show_item(number: int, key: str, item: Item, correction: str | None) -> None:
    """A small picture with its answer; its name is text, never markup."""
    if isinstance(item.answer, Prediction) and item.thumbnail:
        st.image(item.thumbnail, width="stretch", alt="")
        st.text(item.name[-MAX_NAME:])
        words = f"{PLAIN_VERDICTS[item.answer.verdict]}, {item.answer.meme_probability:.0%}"
        st.caption(f"{words} · you: {CLASS_NAMES[correction]}" if correction else words)
        if st.button(f"Open {number}", key=f"open-{key}"):
            open_item(key)
    else:
        st.text(item.name[-MAX_NAME:])
        st.caption(str(item.answer))


def contents(uploads: dict[str, UploadedFile]) -> Iterator[tuple[str, bytes]]:
    return ((key, upload.getvalue()) for key, upload in uploads.items())


release_session_when_closed()
st.set_page_config(page_title="Meme Classifier", page_icon=page_icon(), layout="wide")
st.html(background_css())
st.html(HERE / "style.css")

with st.container(key="page"):
    st.title("Meme or not a meme?", anchor=False)
    st.write("Give pictures, read the answers, and see on a heatmap where in the picture each comes from.")
    one_by_one, whole = st.tabs(["Pictures", "A whole folder"])
    pictures = one_by_one.file_uploader(
        "Drop pictures here, browse for them, or paste one",
        type=list(SUFFIXES),
        accept_multiple_files=True,
        max_upload_size=MAX_MEGABYTES,
        help=ABOUT_FILES + " To paste: Tab key to the upload area, then Ctrl+V.",
    )
    folder = whole.file_uploader(
        "Drop or choose a folder",
        type=list(SUFFIXES),
        accept_multiple_files="directory",
        max_upload_size=MAX_MEGABYTES,
        help=ABOUT_FILES,
    )
    st.caption(
        f"Up to {MAX_PICTURES} pictures and {MAX_TOTAL_MEGABYTES} MB at once; for more, there is the command line: "
        "python classify.py FOLDER --csv FILE. "
        "One marked with ! did not arrive: it is no picture, too large, or the server is full."
    )
    came = order_uploads([*pictures, *sorted(folder, key=lambda upload: upload.name)])
    example = st.pills("Or try one of ours", list(EXAMPLES), key="example")
    within = count_within_limits([upload.size for upload in came.values()])
    uploads = dict(list(came.items())[:within])
    if within < len(came):
        st.warning(f"Only the first {within} of these {len(came)} pictures are looked at; that is the limit.")

    st.session_state.setdefault("corrections", {})
    if example or uploads:
        try:
            load_classifier()
        except (BadCheckpoint, BadEngine) as error:
            st.error(str(error))
            st.stop()
    newest = next(reversed(uploads.values()), None)
    data = EXAMPLES[example].read_bytes() if example else newest.getvalue() if newest else None
    progress = st.empty()
    if data is not None:
        with st.container(border=True, key="answer"):
            show(data, "page", newest.name if newest and len(uploads) > 1 and not example else "")
    if len(uploads) > 1:
        with st.container(border=True, key="gallery"):
            show_gallery(classify_uploads(uploads, progress), uploads)
