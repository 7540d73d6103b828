"""Heatmaps: where in a picture the evidence for an answer lies, painted over it.

Grad-CAM: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv 1610.02391. The other methods name their papers below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from borders import FRAME_GRID, content_box
from images import resize_to_square
from model import MEME, Classifier, Prediction

# Colours from weak to strong, each (256, 3). Jet is what everybody knows; viridis rises evenly in
# brightness and is read alike by the colour-blind.
COLOUR_MAPS = {
    name: (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8) for name in ("jet", "viridis")
}
FADE = 0.25  # heat below this fades out, so that no evidence leaves the picture as it is
STRIP = 256  # rows painted at once; for all at once, the steps between would take several times the photo
LEGEND_SIZE = (512, 24)  # pixels
OCCLUSION_CELLS = 8  # along each side
OCCLUSION_WINDOW = 2  # cells along each side of the hidden square
OPACITY = 0.6  # of the colours over a picture
HIDDEN_SHARE = 0.2  # of the picture's area, for the check of a heatmap


@dataclass(frozen=True, slots=True)
class Explanation:
    """A prediction with its reasons, from one forward pass.

    Attributes:
        prediction: what `Classifier.predict` says of the same picture.
        heat: class name -> evidence for that class over the whole picture, shape (h, w), float32 from 0 (none)
            to 1 (the method's full scale), the same scale for every picture and class.
    """

    prediction: Prediction
    heat: dict[str, NDArray[np.float32]]


def grad_cam(feature_map: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM, equations 1 and 2 of the paper.

    Like the three below it takes a feature map and the gradients of one class's logits by it, both of
    shape (N, K, h, w), and gives maps of shape (N, h, w), never negative.
    """
    weights = gradients.mean((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (weights * feature_map).sum(1).relu()


def grad_cam_plus_plus(feature_map: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++, equations 10 and 19 of Chattopadhay et al. 2018, arXiv 1710.11063."""
    total = feature_map.sum((2, 3), keepdim=True)  # (N, K, 1, 1)
    alpha = gradients**2 / (2 * gradients**2 + total * gradients**3).where(gradients > 0, 1)
    weights = (alpha * gradients.relu()).sum((2, 3), keepdim=True)  # (N, K, 1, 1)
    return (weights * feature_map).sum(1).relu()


def hires_cam(feature_map: Tensor, gradients: Tensor) -> Tensor:
    """HiResCAM, equation 3 of Draelos and Carin 2020, arXiv 2011.08891."""
    return (gradients * feature_map).sum(1).relu()


def layer_cam(feature_map: Tensor, gradients: Tensor) -> Tensor:
    """LayerCAM, equations 6 and 7 of Jiang et al. 2021, IEEE Transactions on Image Processing 30."""
    return (gradients.relu() * feature_map).sum(1).relu()


@dataclass(frozen=True, slots=True)
class Method:
    """A way to turn gradients into a heatmap.

    Attributes:
        layer: the stage of the network whose output is read.
        formula: (feature map, gradients) -> maps.
    """

    layer: str
    formula: Callable[[Tensor, Tensor], Tensor]


# The last feature map has S/32 cells along each side; the third block's has twice as many. On the last one,
# HiResCAM would be Grad-CAM exactly.
LAST_LAYER, FINER_LAYER = "relu", "denseblock3"
METHODS = {
    "Grad-CAM": Method(LAST_LAYER, grad_cam),
    "Grad-CAM++": Method(LAST_LAYER, grad_cam_plus_plus),
    "HiResCAM": Method(FINER_LAYER, hires_cam),
    "LayerCAM": Method(FINER_LAYER, layer_cam),
}
GRAD_CAM = "Grad-CAM"
OCCLUSION = "Occlusion"  # needs no gradients, only many forward passes


def explain(classifier: Classifier, pictures: Sequence[Image.Image], method: str = GRAD_CAM) -> list[Explanation]:
    """Classify upright RGB pictures and say where the evidence for each class lies.

    Args:
        classifier: whose answers to explain.
        pictures: any number.
        method: one of `METHODS`, or `OCCLUSION`.
    """
    if not pictures:
        return []
    inputs = classifier.preprocess(pictures)
    if method == OCCLUSION:
        explanations = [occlude(classifier, one) for one in inputs]
    else:
        explanations = explain_inputs(classifier, inputs, method)
    return [pad_to_border(explanation, picture) for explanation, picture in zip(explanations, pictures, strict=True)]


def pad_to_border(explanation: Explanation, picture: Image.Image) -> Explanation:
    """The explanation of what is `content_box`, over the whole picture; a frame, which nobody saw, has no heat."""
    box = content_box(picture)
    if box is None:
        return explanation
    sides = zip(box, picture.size * 2, strict=True)
    left, top, right, bottom = (round(side / whole * FRAME_GRID) for side, whole in sides)
    placed = {}
    for name, heat in explanation.heat.items():
        placed[name] = np.zeros((FRAME_GRID, FRAME_GRID), np.float32)
        placed[name][top:bottom, left:right] = stretch(heat, (right - left, bottom - top))
    return replace(explanation, heat=placed)


def explain_inputs(classifier: Classifier, inputs: Tensor, method: str = GRAD_CAM) -> list[Explanation]:
    """Do the same for preprocessed pictures of shape (N, 3, S, S), without their frames, by one of `METHODS`."""
    logits, feature_map = forward_with_feature_map(classifier.network, inputs, METHODS[method].layer)
    heat = {
        name: (evidence(logits, feature_map, index, method) / classifier.evidence_scales[method]).clamp(0, 1).numpy()
        for index, name in enumerate(classifier.classes)
    }
    predictions = classifier.judge(inputs, logits.detach())
    return [
        Explanation(prediction, {name: maps[i] for name, maps in heat.items()})
        for i, prediction in enumerate(predictions)
    ]


def forward_with_feature_map(network: nn.Module, inputs: Tensor, layer: str = LAST_LAYER) -> tuple[Tensor, Tensor]:
    """Run the network once and keep one stage's output where gradients can reach it.

    Many threads share the network, so a hook on it would also catch other visitors' pictures.
    The hook sits on a module made for this call, which comes after the stage; nothing of the
    network is touched. The hook hands on a leaf of its own, so that the backward pass ends
    there and leaves no `.grad` anywhere.

    Args:
        network: from `model.build_network` or `model.for_inference`, frozen and in evaluation mode.
        inputs: shape (N, 3, S, S).
        layer: name of the stage.

    Returns:
        Logits of shape (N, 2), and the stage's output, of shape (N, K, h, w).
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    chain: list[nn.Module] = []
    for name, stage in [*network.get_submodule("features").named_children(), *list(network.named_children())[1:]]:
        chain.append(stage)
        if name == layer:
            chain.append(nn.Identity())
            handle = chain[-1].register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = nn.Sequential(*chain)(inputs)
    finally:
        handle.remove()
    return logits, kept[0]


def evidence(logits: Tensor, feature_map: Tensor, class_index: int, method: str = GRAD_CAM) -> Tensor:
    """The method's maps of shape (N, h, w), times the number of cells.

    Grad-CAM averages over the cells; like this, a cell's value is the logit that the picture would
    reach if it looked like this cell everywhere.

    Args:
        logits: shape (N, classes), computed from `feature_map`.
        feature_map: shape (N, K, h, w), of the method's layer.
        class_index: whose evidence to show.
        method: one of `METHODS`.
    """
    (gradients,) = torch.autograd.grad(logits[:, class_index].sum(), feature_map, retain_graph=True)
    cells = feature_map.shape[2] * feature_map.shape[3]
    return METHODS[method].formula(feature_map.detach().float(), gradients.float()) * cells


def occlude(classifier: Classifier, inputs: Tensor) -> Explanation:
    """Explain one input of shape (3, S, S) by occlusion; where heat is 1, hiding leaves 1/e of the odds or less."""
    logits, falls = occlusion_sensitivity(classifier, inputs)
    (prediction,) = classifier.judge(inputs[None], logits)
    heat = {name: (falls if name == MEME else -falls).clip(0, 1) for name in classifier.classes}
    return Explanation(prediction, heat)


def occlusion_sensitivity(classifier: Classifier, inputs: Tensor) -> tuple[Tensor, NDArray[np.float32]]:
    """Hide one square after another and see how far the log-odds of meme fall.

    Zeiler and Fergus 2013, arXiv 1311.2901. A cell's value is the mean over the squares that cover it.

    Args:
        classifier: whose answer to explain.
        inputs: one picture's, of shape (3, S, S).

    Returns:
        The logits of the whole picture, of shape (1, 2), and the falls, of shape (`OCCLUSION_CELLS`,) * 2.
    """
    cell, cells, window = inputs.shape[-1] // OCCLUSION_CELLS, OCCLUSION_CELLS, OCCLUSION_WINDOW
    corners = [(row, column) for row in range(cells - window + 1) for column in range(cells - window + 1)]
    hidden = inputs.repeat(len(corners) + 1, 1, 1, 1)  # the last one stays whole
    for one, (row, column) in zip(hidden, corners, strict=False):
        one[:, row * cell : (row + window) * cell, column * cell : (column + window) * cell] = 0  # the mean colour
    with torch.inference_mode():
        logits = classifier.network(hidden)  # (squares + 1, 2)
    ours = classifier.classes.index(MEME)
    log_odds = (logits[:, ours] - logits[:, 1 - ours]).numpy() / classifier.temperature
    falls, covers = np.zeros((2, cells, cells), np.float32)
    for without, (row, column) in zip(log_odds, corners, strict=False):
        square = np.s_[row : row + window, column : column + window]
        falls[square] += log_odds[-1] - without
        covers[square] += 1
    return logits[-1:], falls / covers


@dataclass(frozen=True, slots=True)
class Check:
    """What becomes of the answer when the part that a heatmap calls important is hidden.

    Attributes:
        share: of the picture inside its frame that is hidden: `HIDDEN_SHARE`, or all that has heat if that is less.
        hidden: the picture with its strongest part blurred away.
        blurred: probability of meme of that picture.
        mean_colour: the same with that part in the picture's mean colour.
        control: the same with as much blurred away where the heatmap is weakest.
    """

    share: float
    hidden: Image.Image
    blurred: float
    mean_colour: float
    control: float


def check(classifier: Classifier, picture: Image.Image, heat: NDArray[np.float32]) -> Check:
    """Put a heatmap to the test: an important part should be missed, an unimportant one should not.

    A frame is left as it is. What is inside is judged alone, for hiding parts of it may make a frame or break one.

    Args:
        classifier: whose answer to test.
        picture: upright RGB.
        heat: over the whole picture, as `explain` gives it.
    """
    left, top, right, bottom = content_box(picture) or (0, 0, *picture.size)
    rows, columns = heat.shape[0] / picture.height, heat.shape[1] / picture.width
    inside = picture.crop((left, top, right, bottom))
    heat = heat[round(top * rows) : round(bottom * rows), round(left * columns) : round(right * columns)]
    blurred = inside.filter(ImageFilter.GaussianBlur(max(inside.size) / 12))
    plain = Image.new("RGB", inside.size, mean_colour(inside))
    strongest, weakest, share = top_and_bottom_masks(heat, inside.size)
    altered = [
        Image.composite(substitute, inside, part)
        for substitute, part in ((blurred, strongest), (plain, strongest), (blurred, weakest))
    ]
    squares = [resize_to_square(one, classifier.preprocessing.input_size) for one in altered]
    answers = classifier.answer(classifier.preprocessing.normalise(squares))
    hidden = picture.copy()
    hidden.paste(altered[0], (left, top))
    return Check(share, hidden, *(answer.meme_probability for answer in answers))


def top_and_bottom_masks(heat: NDArray[np.float32], size: tuple[int, int]) -> tuple[Image.Image, Image.Image, float]:
    """The parts of a picture of this size (width, height) with most heat and with least, and the share of each.

    Both are white on black and equally large.
    """
    # Bilinear: bicubic would dip below zero beside a peak and rise above zero beyond.
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)).ravel()
    count = min(round(HIDDEN_SHARE * smooth.size), int((smooth > 0).sum()))
    # Where heat is equal, chance decides: the first pixels would be the top of the picture, a caption's place.
    order = np.lexsort((np.random.default_rng(0).random(smooth.size), -smooth))
    parts = []
    for chosen in (order[:count], order[len(order) - count :]):
        white = np.zeros(smooth.size, np.uint8)
        white[chosen] = 255
        parts.append(Image.fromarray(white.reshape(size[1], size[0])))
    return parts[0], parts[1], count / smooth.size


def mean_colour(picture: Image.Image) -> tuple[int, ...]:
    """The mean of each channel of an RGB picture."""
    return tuple(np.asarray(picture).mean((0, 1)).round().astype(int).tolist())


def stretch(
    heat: NDArray[np.float32], size: tuple[int, int], rows: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """A heatmap at the size (width, height) of the picture it was computed from, of shape (height, width).

    The network saw the picture squashed, so stretching the map back over the whole picture
    puts every cell on the part that it saw.

    Args:
        heat: shape (h, w).
        size: of the picture, in pixels.
        rows: of the result; if given, only those from the first up to the second.
    """
    top, bottom = rows or (0, size[1])
    box = (0, top / size[1] * heat.shape[0], heat.shape[1], bottom / size[1] * heat.shape[0])
    stretched = Image.fromarray(heat).resize((size[0], bottom - top), Image.Resampling.BICUBIC, box)
    return np.asarray(stretched).clip(0, 1)  # bicubic overshoots a little


def overlay(
    picture: Image.Image, heat: NDArray[np.float32], opacity: float = OPACITY, colour_map: str = "jet"
) -> Image.Image:
    """Lay heat over the picture it was computed from.

    Args:
        picture: upright RGB.
        heat: shape (h, w), from 0 to 1.
        opacity: of the colours where there is evidence, from 0 to 1.
        colour_map: one of `COLOUR_MAPS`.

    Returns:
        An RGB picture of the same size.
    """
    painted = picture.copy()
    for top in range(0, picture.height, STRIP):
        smooth = stretch(heat, picture.size, (top, min(top + STRIP, picture.height)))
        colours = Image.fromarray(COLOUR_MAPS[colour_map][(smooth * 255).astype(np.uint8)])
        mask = (opacity * (smooth / FADE).clip(max=1) * 255).astype(np.uint8)
        painted.paste(colours, (0, top), Image.fromarray(mask))
    return painted


def legend(colour_map: str = "jet") -> Image.Image:
    """The colours of an overlay from no evidence (left) to strong evidence (right), on grey."""
    heat = np.linspace(0, 1, LEGEND_SIZE[0], dtype=np.float32)[None]  # (1, width)
    return overlay(Image.new("RGB", LEGEND_SIZE, "#808080"), heat, opacity=1, colour_map=colour_map)


def to_png(heatmap: Image.Image, classifier: Classifier, prediction: Prediction, shown: str, method: str) -> bytes:
    """A PNG that says in its text chunks how it came about: whose answer, and which class's evidence by what method."""
    about = PngInfo()
    about.add_text("Software", "Meme Classifier")
    about.add_text("Checkpoint SHA-256", classifier.sha256)
    about.add_text("Method", method)
    about.add_text("Evidence for", shown)
    about.add_text("Probability of meme", f"{prediction.meme_probability:.4f}")
    buffer = BytesIO()
    heatmap.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def answer_png(classifier: Classifier, picture: Image.Image, explanation: Explanation) -> bytes:
    """The picture under the Grad-CAM of its own answer, as a PNG that says how it came about."""
    label = explanation.prediction.label
    return to_png(overlay(picture, explanation.heat[label]), classifier, explanation.prediction, label, GRAD_CAM)
