"""The page: streamlit run app.py"""

import base64
import hashlib
import os
from io import BytesIO
from pathlib import Path
from threading import BoundedSemaphore

import streamlit as st
import torch
from PIL import Image

from gradcam import Explanation, explain, legend, overlay
from images import FORMAT_NAMES, MAX_MEGABYTES, SUFFIXES, BadImage, open_picture
from model import MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier

HERE = Path(__file__).parent
EXAMPLES = {path.stem.replace("_", " ").capitalize(): path for path in sorted((HERE / "examples").glob("*.jpg"))}
# The words carry the verdict; the colour only repeats it.
VERDICTS = {MEME: ":orange[Meme]", NOT_MEME: ":blue[Not a meme]", NOT_SURE: "Not sure"}
# From which heat on the strongest place is called what; the legend's colours change there.
STRENGTHS = ((0.87, "strong"), (0.6, "moderate"), (0.02, "weak"), (0, "none"))
EVIDENCE = {MEME: "for a meme", NOT_MEME: "against a meme"}


@st.cache_resource(show_spinner="Loading the network …")
def load_classifier() -> Classifier:
    # Visitors' own threads keep the cores busy; more threads inside one answer only fight over them.
    torch.set_num_threads(1)
    return Classifier.load()


@st.cache_resource
def free_cores() -> BoundedSemaphore:
    """One picture per core at a time: an open large picture can hold some 500 MB."""
    return BoundedSemaphore(os.cpu_count() or 1)


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
    with free_cores():
        picture = open_picture(data)
        return picture, explain(load_classifier(), [picture])[0]


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@st.fragment
def show_answer(picture: Image.Image, explanation: Explanation, key: str) -> None:
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

    left, right = st.columns(2)
    st.image(legend(), alt="Colour scale from no evidence, uncoloured, through blue, green, yellow and orange to red")
    st.caption("No colour: no evidence · blue and green: weak · yellow and orange: moderate · red: strong.")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        shown = st.segmented_control(
            "Show the evidence",
            list(EVIDENCE),
            format_func=EVIDENCE.__getitem__,
            default=explanation.prediction.label,
            required=True,
            key=key,  # a new picture starts with the evidence for its own answer
        )
        opacity = st.slider("Opacity of the heatmap", 0, 100, 60, step=5, format="%d %%", width=280)
        download = st.container(width="content")

    heat = explanation.heat[shown]
    heatmap = overlay(picture, heat, opacity / 100)
    strength = next(words for least, words in STRENGTHS if heat.max() >= least)
    left.image(picture, caption="Your picture", alt="The picture as it was judged", width="stretch")
    found = f"Evidence {EVIDENCE[shown]}: {strength}"
    right.image(heatmap, caption=found, alt=f"The same picture under its heatmap. {found}", width="stretch")
    download.download_button(
        "Download the heatmap",
        lambda: png(heatmap),
        file_name="heatmap.png",
        mime="image/png",
        on_click="ignore",
        icon=":material/download:",
    )


def forget_example() -> None:
    st.session_state["example"] = None


st.set_page_config(page_title="Meme Classifier", page_icon=page_icon(), layout="wide")
st.html(background_css())
st.html(HERE / "style.css")

with st.container(key="page"):
    st.title("Meme or not a meme?", anchor=False)
    st.write("Give a picture, read the answer, and see on a heatmap where in the picture it comes from.")
    upload = st.file_uploader(
        "Drop a picture here, browse for one, or paste one",
        type=list(SUFFIXES),
        max_upload_size=MAX_MEGABYTES,
        on_change=forget_example,
        help=f"{FORMAT_NAMES}, up to {MAX_MEGABYTES} MB. To paste: Tab key to the upload area, then Ctrl+V.",
    )
    example = st.pills("Or try one of ours", list(EXAMPLES), key="example")
    data = EXAMPLES[example].read_bytes() if example else upload.getvalue() if upload else None

    if data is not None:
        with st.container(border=True, key="answer"):
            try:
                show_answer(*answer(data), key=hashlib.sha256(data).hexdigest())
            except (BadImage, BadCheckpoint) as error:
                st.error(str(error), icon=":material/broken_image:")
