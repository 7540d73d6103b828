"""The page: streamlit run app.py"""

import base64
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import streamlit as st
import torch
from numpy.typing import NDArray
from PIL import Image
from streamlit.delta_generator import DeltaGenerator

import gallery
import gradcam
from borders import content_box
from engine import BadEngine, load_for_page
from gallery import CLASS_NAMES, WORDS, Item, error_sentence, escape_markdown, name_html, picture_html, verdict_in_words
from gradcam import GRAD_CAM, METHODS, OCCLUSION, Explanation, FaithfulnessCheck, explain, overlay
from images import FORMAT_NAMES, MAX_MEGABYTES, BadImage, open_picture
from model import MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier, Prediction
from sessions import core_semaphore, release_session_when_closed

HERE = Path(__file__).parent
EXAMPLES = {path.stem.replace("_", " ").capitalize(): path for path in sorted((HERE / "examples").glob("*.jpg"))}
COLOURS = {MEME: "orange", NOT_MEME: "blue", NOT_SURE: "gray"}
EVIDENCE = {MEME: "What speaks for a meme", NOT_MEME: "What speaks against a meme"}
# The lowest heat of the strongest place for each word; the legend's colours change there.
STRENGTHS = ((0.87, "strong"), (0.6, "moderate"), (0.02, "weak"), (0, "none"))
COLOUR_MAPS = {
    "jet": "No colour: no evidence · blue and green: weak · yellow and orange: moderate · red: strong.",
    "viridis": "No colour: no evidence · purple to teal: weak · green: moderate · yellow: strong.",
}
ABOUT_FILES = (
    f"{FORMAT_NAMES}, up to {MAX_MEGABYTES} MB each. Paste works anywhere on the page. A folder is taken in portions: "
    f"the answers to {gallery.MAX_ITEMS} pictures stay, and the last {gallery.MAX_TOTAL_MEGABYTES} MB of originals. "
    "For more, use the command line: python classify.py FOLDER --csv FILE."
)
ABOUT_MEMES = (
    "**A meme** is a picture remade to be shared for a joke: a caption on a known image, labelled people or things, "
    "panels with a punch line.  \n**Not a meme**: photos, art, posters, charts, documents and screenshots, even funny "
    "ones, without such a joke on them."
)
PRIVACY = "Your pictures stay in this server's memory and are deleted when you close the tab."
MODEL_CARD = "[Model card](?page=model-card): how it was trained, what it gets wrong."
GROUPS = {"card": "quote cards", "chart": "charts", "comic": "comics", "document": "documents", "graphic": "graphics"}
GROUPS |= {"photo": "photos", "poster": "posters", "scenetext": "photos of signs", "screenshot": "screenshots"}
ABOUT_METHODS = """
**Grad-CAM**: the evidence that adds up to the answer, in large cells. **Grad-CAM++**: weighs several separate
places more evenly. **HiResCAM**, **LayerCAM**: smaller cells, from an earlier layer, so less of the whole
reasoning. **Occlusion**: hides one square after another and measures the probability; takes longer.
"""
ABOUT_TEST = (
    "Blurs the strongest part of the heatmap and classifies again. The heatmap holds if the probability falls by a "
    "third or more, partly from a tenth on. Blurring the weakest part must not do the same."
)
TEST_RESULTS = {
    gradcam.HOLDS: "Holds: without the marked part {}.",
    gradcam.PARTLY: "Partly: without the marked part {}; other parts matter, too.",
    gradcam.FAILS: "Does not hold: {}, other parts carry the answer too.",
}
# In the dialog, it only tells screen readers the answer. Its styles are in style.css.
client = st.components.v2.component(
    "client",
    html='<div role="status"></div><progress aria-label="Uploading" hidden></progress>',
    js=(HERE / "client.js").read_text(encoding="utf-8"),
    isolate_styles=False,
)
LOST = "The connection to the server was lost, and your pictures with it. The page works again: add them once more."


@st.cache_resource(show_spinner="Loading the network …")
def load_classifier() -> Classifier:
    torch.set_num_threads(1)  # sessions run in parallel; more threads per answer would only compete
    return load_for_page()


@contextmanager
def acquire_core() -> Iterator[None]:
    """Hold a core; a session that has to wait for one says so."""
    cores = core_semaphore()
    taken = cores.acquire(blocking=False)
    try:  # starts right after the line above, because Streamlit may stop a script at any line
        if not taken:
            with st.spinner("Other visitors' pictures are being classified; yours is waiting …"):
                taken = cores.acquire()
        yield
    finally:
        if taken:
            cores.release()


@st.cache_resource
def page_icon() -> Image.Image:
    """A corner of the background; a Material icon would be fetched from a third party."""
    return Image.open(HERE / "background.png").crop((1520, 80, 1760, 320))


@st.cache_resource
def background_css() -> str:
    """The background as a CSS rule, because a picture beside the script has no URL.

    Streamlit sends a message of this length once per session, and only its hash in later reruns.
    """
    encoded = base64.b64encode((HERE / "background.png").read_bytes()).decode()
    return f"<style>:root {{ --background: url(data:image/png;base64,{encoded}) }}</style>"


@st.cache_resource
def example_thumbnails() -> dict[str, bytes]:
    """A small JPEG of each example."""
    return {name: gallery.thumbnail(open_picture(path)) for name, path in EXAMPLES.items()}


@st.cache_data(max_entries=16, show_spinner="Classifying the picture …")
def answer(data: bytes) -> tuple[Image.Image, Explanation]:
    with acquire_core():
        picture = open_picture(data)
        return picture, explain(load_classifier(), [picture])[0]


@st.cache_data(max_entries=64, show_spinner="Computing the heatmap …")
def cached_heat(method: str, data: bytes) -> dict[str, NDArray[np.float32]]:
    picture, explanation = answer(data)
    if method == GRAD_CAM:
        return explanation.heat
    with acquire_core():
        return explain(load_classifier(), [picture], method)[0].heat


@st.cache_data(max_entries=16, show_spinner="Testing the heatmap …")
def cached_check(method: str, label: str, data: bytes) -> FaithfulnessCheck:
    picture, _ = answer(data)  # before a core is acquired, since it may need one itself
    heat = cached_heat(method, data)[label]
    with acquire_core():
        return gradcam.check_faithfulness(load_classifier(), picture, heat)


def fall_in_words(before: float, after: float, label: str) -> str:
    """How far the probability of a class falls, from two probabilities of meme."""
    return " → ".join(f"{p if label == MEME else 1 - p:.0%}" for p in (before, after))


def show_head(key: str, name: str, prediction: Prediction, place: str) -> None:
    """Name, verdict, buttons to correct it, and what the probability is worth."""
    correction = st.session_state["corrections"].get(key)
    verdict, probability = correction or prediction.verdict, prediction.meme_probability
    words = WORDS[verdict] if correction else verdict_in_words(verdict, probability)
    with st.container(horizontal=True, vertical_alignment="bottom", key=f"{place}-head"):
        with st.container(width="stretch", gap="xxsmall"):
            st.html(name_html(name))
            st.header(f":{COLOURS[verdict]}[{words}]", anchor=False)
        with st.container(
            horizontal=True, vertical_alignment="center", width="content", gap="xsmall", key=f"{place}-verdict"
        ):
            st.caption("Your verdict", width="content")
            for choice, letter in ((MEME, "M"), (NOT_MEME, "N")):
                st.button(
                    WORDS[choice],
                    key=f"{place}-{choice}",
                    on_click=gallery.correct,
                    args=(key, choice),
                    type="primary" if correction == choice else "secondary",
                    shortcut=letter,
                )
            corrected = bool(st.session_state["corrections"])
            st.button(
                "Undo", key=f"{place}-undo", on_click=gallery.undo, args=(key,), disabled=not corrected, shortcut="U"
            )
    low, high = gallery.edges(st.session_state["strictness"], load_classifier())
    with st.container(key=f"{place}-bar", gap="xxsmall"):
        st.html(
            f"<style>.st-key-{place}-head, .st-key-{place}-bar {{--fill: var(--{verdict})}}"
            f".st-key-{place}-bar {{--low: {low:.1%}; --high: {high:.1%}}}"
            f".st-key-{place}-head h2::before {{content: '{gallery.ICONS[verdict]} ' / ''}}</style>"
        )
        st.progress(probability, text=f"Probability that this is a meme: {probability:.0%}")
        worth = gallery.worth_in_words(probability)
        if correction:
            worth += f" The classifier's verdict: {verdict_in_words(prediction.verdict, probability)}."
        elif verdict == NOT_SURE:
            worth += " Often misjudged, so decide for yourself."
        st.caption(worth)
        between = "in between: not sure · " if low < high else ""
        with st.container(key=f"{place}-scale"):
            st.caption(f"Up to {low:.0%}: not a meme · {between}from {high:.0%} on: meme.")


def choose_display(place: str) -> tuple[str, str, float]:
    """Method, colour map and opacity of the heatmap; they stay the same for the next picture."""
    with st.popover("Display", icon=":material/tune:"):
        method = st.selectbox(
            "Method", [*METHODS, OCCLUSION], help=ABOUT_METHODS, key=f"{place}-method", persist_state="page"
        )
        colour_map = st.segmented_control(
            "Colours",
            list(COLOUR_MAPS),
            format_func=str.capitalize,
            default="jet",
            required=True,
            key=f"{place}-colours",
            persist_state="page",
        )
        st.caption(COLOUR_MAPS[colour_map])
        opacity = st.slider(
            "Opacity of the heatmap",
            0,
            100,
            round(100 * gradcam.OPACITY),
            step=5,
            format="%d %%",
            key=f"{place}-opacity",
            persist_state="page",
        )
    return method, colour_map, opacity / 100


def show_heatmap(prediction: Prediction, data: bytes, place: str) -> None:
    """Picture and heatmap, and the controls that redraw them without classifying again."""
    picture, explanation = answer(data)

    label_key, picture_key = f"{place}-evidence", f"{place}-picture"
    sha256 = hashlib.sha256(data).hexdigest()
    # A new picture starts with the evidence for its own answer. (A widget key for each picture would do that, too, but
    # Streamlit remembers every key until the session ends.)
    if st.session_state.get(picture_key) != sha256 or label_key not in st.session_state:
        st.session_state[picture_key] = sha256
        st.session_state[label_key] = prediction.label

    with st.container(key=f"{place}-pair"):
        left, right = st.columns(2, gap="small", wrap=False)
    with st.container(horizontal=True, vertical_alignment="center", key=f"{place}-controls"):
        chosen = st.segmented_control(
            "Show the evidence",
            list(EVIDENCE),
            format_func=lambda label: f"{'for' if label == MEME else 'against'} a meme",
            required=True,
            key=label_key,
            label_visibility="collapsed",
        )
        test = st.toggle("Test the heatmap", help=ABOUT_TEST, key=f"{place}-test")
        download = st.container(width="content")
        method, colour_map, opacity = choose_display(place)

    label = chosen or prediction.label
    heat = (explanation.heat if method == GRAD_CAM else cached_heat(method, data))[label]

    def heatmap_file() -> bytes:
        """What is shown, as a PNG of the picture's own size."""
        with core_semaphore():
            painted = overlay(open_picture(data, whole=True), heat, opacity, colour_map)
            return gradcam.encode_png(painted, load_classifier(), prediction, label, method)

    strength = next(words for least, words in STRENGTHS if heat.max() >= least)
    title = f"{EVIDENCE[label]}: {strength}"
    if test and heat.any():
        checked = cached_check(method, label, data)
        hidden = f"Your picture without the strongest {checked.masked_share:.0%}"
        show_picture(left, hidden, checked.masked_picture, hidden)
        show_test(checked, prediction.meme_probability, label)
    else:
        box = content_box(picture)
        show_picture(left, "Your picture", gradcam.outline(picture, box), "The picture as it was judged")
        for sentence in gallery.notes(picture, box):
            left.caption(sentence)
        if test:
            st.write("This heatmap marks nothing, so there is nothing to hide.")
    show_picture(
        right, title, overlay(picture, heat, opacity, colour_map), f"The same picture under its heatmap. {title}"
    )
    with right.container(horizontal=True, vertical_alignment="center", gap="xsmall", key=f"{place}-legend"):
        st.caption("none", width="content")
        st.image(gradcam.legend(colour_map), alt=f"Colour scale. {COLOUR_MAPS[colour_map]}", width="stretch")
        st.caption("strong", width="content")
    download.download_button(
        "Download",
        heatmap_file,
        file_name="heatmap.png",
        mime="image/png",
        help="Download the heatmap",
        on_click="ignore",
        icon=":material/download:",
        key=f"{place}-download",
    )


def show_picture(place: DeltaGenerator, title: str, picture: Image.Image, alt: str) -> None:
    place.markdown(f"**{title}**")
    place.image(picture, alt=alt, width="stretch")


def show_test(checked: FaithfulnessCheck, before: float, label: str) -> None:
    """What became of the probability of the class whose evidence is shown: in one sentence, and in figures."""
    towards = [p if label == MEME else 1 - p for p in (before, checked.blurred, checked.control)]
    result = TEST_RESULTS[gradcam.faithfulness_verdict(towards[0], towards[1], towards[2])]
    st.markdown(result.format(f"**{fall_in_words(before, checked.blurred, label)}**"))
    with st.expander("Figures"):
        st.write(
            f"Without the strongest {checked.masked_share:.0%} of the heatmap (blurred): "
            f"{CLASS_NAMES[label]} **{fall_in_words(before, checked.blurred, label)}**. "
            f"With that part in the picture's mean colour: {fall_in_words(before, checked.mean_colour, label)}. "
            f"With the weakest {checked.masked_share:.0%} blurred instead: "
            f"{fall_in_words(before, checked.control, label)}."
        )


def show_item(key: str, item: Item, data: bytes | None, place: str) -> None:
    """The answer to one picture at its largest; `data` is None if the original is no longer there."""
    if isinstance(item.answer, BadImage):
        st.error(escape_markdown(error_sentence(item.name, item.answer)), icon=":material/broken_image:")
        return
    show_head(key, item.name, item.answer, place)
    if data is None:
        st.html(f'<div class="small">{picture_html(item.thumbnail or b"")}</div>')
        st.caption(f"{item.warning} The original had to make room for newer pictures. Add it again to see its heatmap.")
    elif place == "dialog":  # which is a fragment
        show_heatmap(item.answer, data, place)
    else:
        st.fragment(show_heatmap)(item.answer, data, place)


def show_in_dialog(key: str, item: Item, data: bytes | None) -> None:
    """One picture in the dialog."""
    show_item(key, item, data, "dialog")
    client(data={"status": gallery.in_one_sentence(item, st.session_state["corrections"].get(key))}, key="reviewed")


def classify_single(name: str, data: bytes) -> Item:
    try:
        picture, explanation = answer(data)
    except BadImage as error:
        return Item(name, error)
    prediction = gallery.with_strictness(explanation.prediction, st.session_state["strictness"], load_classifier())
    return Item(name, prediction, warning=picture.info["warning"])


def show_introduction() -> None:
    """Examples to try, what counts as a meme, and how good the answers are."""
    st.markdown("Or try an example:")
    with st.container(key="examples"):
        for name, small in example_thumbnails().items():
            with st.container(key=f"example-card-{name}"):
                st.html(picture_html(small))
                st.button(name, key=f"example-{name}", on_click=st.session_state.update, kwargs={"example": name})
    measured = gallery.metrics()
    weakest = sorted(measured["groups"].items(), key=lambda group: group[1]["accuracy"])[:2]
    kinds = " and ".join(f"{GROUPS.get(kind, kind)} ({group['accuracy']:.0%})" for kind, group in weakest)
    st.markdown(ABOUT_MEMES)
    st.markdown(
        f"Right on **{measured['accuracy']['value']:.0%}** of {sum(measured['n'].values()):,} pictures from sources it "
        f"never saw; weakest on {kinds}.  \n{PRIVACY} {MODEL_CARD}"
    )


release_session_when_closed()
st.set_page_config(page_title="Meme Classifier", page_icon=page_icon())
st.html(background_css())
st.html(HERE / "style.css")
gallery.start_session()

if st.query_params.get("page") == "model-card":
    with st.container(key="model-card"):
        card = (HERE / "MODEL_CARD.md").read_text(encoding="utf-8")
        st.markdown(re.sub(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", card))  # relative links lead nowhere here
    st.stop()
with st.container(key="page"):
    st.title("Meme or not a meme?", anchor=False)
    with st.container(horizontal=True, vertical_alignment="bottom", key="top"):
        generation = st.session_state["generation"]
        pictures = st.file_uploader(
            "Drop, paste or browse for pictures",
            accept_multiple_files=True,
            max_upload_size=MAX_MEGABYTES,
            help=ABOUT_FILES,
            key=f"pictures-{generation}",
        )
        folder = st.file_uploader(
            "Or a whole folder",
            accept_multiple_files="directory",
            max_upload_size=MAX_MEGABYTES,
            help=ABOUT_FILES,
            key=f"folder-{generation}",
        )
        remove_button = st.empty()
    uploads = gallery.order_uploads([*pictures, *sorted(folder, key=lambda upload: upload.name)])
    order, example = st.session_state["order"], st.session_state["example"]
    lost, progress, status = st.empty(), st.container(key="progress"), ""
    if order or example:
        remove_button.button("Remove all", on_click=gallery.remove_all, icon=":material/delete:")
        try:
            load_classifier()
        except (BadCheckpoint, BadEngine) as error:
            st.error(str(error))
            order, example = [], None
    if example or len(order) == 1:
        with st.container(border=True, key="answer"):
            data: bytes | None = None
            if example:
                key, data = f"Example: {example}", EXAMPLES[example].read_bytes()
                item = classify_single(key, data)
            elif (key := order[0]) in uploads:
                data = uploads[key].getvalue()
                item = classify_single(uploads[key].name, data)
            else:
                item = gallery.items_with_strictness(load_classifier())[key]
            show_item(key, item, data, "page")
            status = gallery.in_one_sentence(item, st.session_state["corrections"].get(key))
        if len(order) < 2:
            gallery.choose_strictness()
    if len(order) > 1:
        with st.container(border=True, key="gallery"):
            status = gallery.show_gallery(uploads, load_classifier(), core_semaphore(), progress, show_in_dialog)
    with st.expander("Examples and accuracy") if status else st.container():
        show_introduction()
    result = client(
        data={"status": status, "held": len(order) + bool(example), "limit": MAX_MEGABYTES * 1_000_000},
        key="client",
        on_refused_change=gallery.take_refused,
        on_reconnected_change=lambda: None,
    )
    if result.reconnected and not order:
        lost.warning(LOST)
