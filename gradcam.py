"""Grad-CAM on DenseNet121's last feature map, and its overlay on the picture.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv 1610.02391.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model import Classifier, Prediction

JET = (colormaps["jet"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)
FADE = 0.25  # heat below this fades out, so that no evidence leaves the picture as it is
LEGEND_SIZE = (512, 24)  # pixels


@dataclass(frozen=True, slots=True)
class Explanation:
    """A prediction with its reasons, from one forward pass.

    Attributes:
        prediction: what `Classifier.predict` says of the same picture.
        heat: class name -> evidence for that class, shape (S/32, S/32), float32 from 0 (none) to
            1 (the checkpoint's full scale), the same scale for every picture and class.
    """

    prediction: Prediction
    heat: dict[str, NDArray[np.float32]]


def explain(classifier: Classifier, pictures: Sequence[Image.Image]) -> list[Explanation]:
    """Classify upright RGB pictures and say where the evidence for each class lies."""
    if not pictures:
        return []
    logits, feature_map = forward_with_feature_map(classifier.network, classifier.preprocess(pictures))
    heat = {
        name: (evidence(logits, feature_map, index) / classifier.evidence_scale).clamp(0, 1).numpy()
        for index, name in enumerate(classifier.classes)
    }
    predictions = classifier.read_logits(logits.detach())
    return [
        Explanation(prediction, {name: maps[i] for name, maps in heat.items()})
        for i, prediction in enumerate(predictions)
    ]


def forward_with_feature_map(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run the network once and keep its last feature map where gradients can reach it.

    Many threads share the network, so a hook on it would also catch other visitors' pictures.
    The hook sits on a ReLU made for this call, which stands in for the network's own; nothing
    of the network is touched. The hook hands on a leaf of its own, so that the backward pass
    ends there, after the last linear layer, and leaves no `.grad` anywhere.

    Args:
        network: from `model.build_network`, frozen and in evaluation mode.
        inputs: shape (N, 3, S, S).

    Returns:
        Logits of shape (N, 2), and the feature map after its ReLU, of shape (N, 1024, S/32, S/32).
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    tap = nn.ReLU()
    handle = tap.register_forward_hook(keep)
    stages = OrderedDict(network.named_children()) | {"relu": tap}
    try:
        with torch.enable_grad():
            logits = nn.Sequential(OrderedDict(stages))(inputs)
    finally:
        handle.remove()
    return logits, kept[0]


def grad_cam(logits: Tensor, feature_map: Tensor, class_index: int) -> Tensor:
    """Grad-CAM, equations 1 and 2 of the paper.

    Args:
        logits: shape (N, classes), computed from `feature_map`.
        feature_map: shape (N, K, h, w).
        class_index: whose evidence to show.

    Returns:
        Maps of shape (N, h, w), never negative, in logits per cell.
    """
    (gradients,) = torch.autograd.grad(logits[:, class_index].sum(), feature_map, retain_graph=True)
    weights = gradients.mean((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (weights * feature_map.detach()).sum(1).relu()  # (N, h, w)


def evidence(logits: Tensor, feature_map: Tensor, class_index: int) -> Tensor:
    """Grad-CAM times the number of cells, of the same shapes.

    Grad-CAM averages over the cells; like this, a cell's value is the logit that the picture would
    reach if it looked like this cell everywhere.
    """
    cells = feature_map.shape[2] * feature_map.shape[3]
    return grad_cam(logits, feature_map, class_index) * cells


def overlay(picture: Image.Image, heat: NDArray[np.float32], opacity: float = 0.5) -> Image.Image:
    """Lay heat over the picture it was computed from, in jet colours.

    The network saw the whole picture squashed, so stretching the map back over the whole picture
    puts every cell on the part that it saw.

    Args:
        picture: upright RGB.
        heat: shape (h, w), from 0 to 1.
        opacity: of the colours where there is evidence, from 0 to 1.

    Returns:
        An RGB picture of the same size.
    """
    stretched = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
    smooth = np.asarray(stretched).clip(0, 1)  # (height, width); bicubic overshoots a little
    colours = Image.fromarray(JET[(smooth * 255).astype(np.uint8)])
    mask = (opacity * (smooth / FADE).clip(max=1) * 255).astype(np.uint8)
    return Image.composite(colours, picture, Image.fromarray(mask))


def legend() -> Image.Image:
    """The colours of an overlay from no evidence (left) to strong evidence (right), on grey."""
    heat = np.linspace(0, 1, LEGEND_SIZE[0], dtype=np.float32)[None]  # (1, width)
    return overlay(Image.new("RGB", LEGEND_SIZE, "#808080"), heat, opacity=1)
