"""What `benchmarks.load` compares our page with: a page of the usual kind, the same network behind one lock.

As demos of heatmap libraries are written (TorchCAM's own downloads its networks, so it is not run here):
one cached network, pytorch-grad-cam's hooks on it, hence a lock. Not for strangers.
"""

from threading import Lock

import numpy as np
import streamlit as st
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from evaluation.dataset import plain_network
from model import MEME, Classifier


@st.cache_resource
def load() -> tuple[Classifier, GradCAM, Lock]:
    network = plain_network()
    return Classifier.load(), GradCAM(network, [network.get_submodule("features.norm5")]), Lock()


classifier, library, lock = load()
uploaded = st.file_uploader("Your picture")
if uploaded:
    picture = Image.open(uploaded).convert("RGB")
    meme = classifier.classes.index(MEME)
    with st.spinner("Computing …"), lock:
        heat = library(classifier.preprocess([picture]), [ClassifierOutputTarget(meme)])[0]
        probability = float(library.outputs.softmax(1)[0, meme])
    st.header("Meme" if probability > 0.5 else "Not a meme")
    st.progress(probability, text=f"Probability: {probability:.0%}")
    st.image(picture)
    enlarged = np.asarray(Image.fromarray(heat).resize(picture.size))
    st.image(show_cam_on_image(np.asarray(picture, np.float32) / 255, enlarged, use_rgb=True))
