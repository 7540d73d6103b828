"""Heatmaps: where in a picture the evidence for a class lies, and an overlay that shows it.

Grad-CAM: Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv 1610.02391. The other methods cite their papers below.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from borders import GRID_SIDE, content_box
from images import resize_to_square
from model import MEME, Classifier, Prediction

# Colours from weak to strong, each of shape (256, 3). Jet is the familiar choice. Viridis rises evenly in
# brightness and is readable for the colour-blind.
COLOUR_MAPS = {
    name: (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8) for name in ("jet", "viridis")
}
FADE_BELOW = 0.25  # heat below this fades to transparent, so that a place without evidence is not tinted
ROWS_AT_ONCE = 256  # rows painted at once; the intermediate arrays of a whole photo would take several times its memory
LEGEND_SIZE = (512, 24)  # pixels
OCCLUSION_CELLS = 8  # along each side
OCCLUSION_WINDOW = 2  # cells along each side of the occluding square
OPACITY = 0.6  # of the colours over a picture
MASKED_SHARE = 0.2  # of the picture's area that `check_faithfulness` masks
HOLDS, PARTLY, FAILS = "holds", "partly", "fails"
LEAST_FALL = {HOLDS: 1 / 3, PARTLY: 1 / 10}  # of the probability, relative, without the marked part


@dataclass(frozen=True, slots=True)
class Explanation:
    """A prediction and its heatmaps, from one forward pass.

    Attributes:
        prediction: the same as `Classifier.predict` gives for this picture.
        heat: maps each class name to the evidence for that class over the whole picture, of shape (h, w),
            float32 from 0 (none) to 1 (the method's full scale). The scale is the same for all pictures and classes.
    """

    prediction: Prediction
    heat: dict[str, NDArray[np.float32]]


def grad_cam(feature_map: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM, equations 1 and 2 of the paper.

    Like the three functions below, it takes a feature map and the gradients of one class's logits with respect to
    it, both of shape (N, K, h, w). It returns non-negative maps of shape (N, h, w).
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
    """A class activation mapping method.

    Attributes:
        layer: name of the stage of the network whose output is the feature map.
        formula: function of the feature map and its gradients that returns the maps.
    """

    layer: str
    formula: Callable[[Tensor, Tensor], Tensor]


# The last feature map has S/32 cells along each side, that of the third block twice as many. On the last one,
# HiResCAM equals Grad-CAM.
LAST_LAYER, FINER_LAYER = "relu", "denseblock3"
METHODS = {
    "Grad-CAM": Method(LAST_LAYER, grad_cam),
    "Grad-CAM++": Method(LAST_LAYER, grad_cam_plus_plus),
    "HiResCAM": Method(FINER_LAYER, hires_cam),
    "LayerCAM": Method(FINER_LAYER, layer_cam),
}
GRAD_CAM = "Grad-CAM"
OCCLUSION = "Occlusion"  # uses many forward passes and no gradients


def explain(classifier: Classifier, pictures: Sequence[Image.Image], method: str = GRAD_CAM) -> list[Explanation]:
    """Classify upright RGB pictures and compute a heatmap for each class.

    Args:
        classifier: the classifier to explain.
        pictures: any number, also none.
        method: one of `METHODS`, or `OCCLUSION`.
    """
    if not pictures:
        return []
    inputs = classifier.preprocess(pictures)
    if method == OCCLUSION:
        explanations = [explain_by_occlusion(classifier, one) for one in inputs]
    else:
        explanations = explain_inputs(classifier, inputs, method)
    return [pad_to_picture(explanation, picture) for explanation, picture in zip(explanations, pictures, strict=True)]


def pad_to_picture(explanation: Explanation, picture: Image.Image) -> Explanation:
    """Pad the heatmaps of the part inside `content_box` to the whole picture. A border has no heat."""
    box = content_box(picture)
    if box is None:
        return explanation
    edges = zip(box, picture.size * 2, strict=True)
    left, top, right, bottom = (round(edge / length * GRID_SIDE) for edge, length in edges)
    padded = {}
    for name, heat in explanation.heat.items():
        padded[name] = np.zeros((GRID_SIDE, GRID_SIDE), np.float32)
        padded[name][top:bottom, left:right] = resize_heatmap(heat, (right - left, bottom - top))
    return replace(explanation, heat=padded)


def explain_inputs(classifier: Classifier, inputs: Tensor, method: str = GRAD_CAM) -> list[Explanation]:
    """Explain preprocessed pictures of shape (N, 3, S, S), whose borders are cropped, with one of `METHODS`."""
    logits, feature_map = forward_with_feature_map(classifier.network, inputs, METHODS[method].layer)
    heat = {}
    for index, name in enumerate(classifier.classes):
        maps = evidence(logits, feature_map, index, method).cpu()  # (N, h, w)
        heat[name] = (maps / classifier.evidence_scales[method]).clamp(0, 1).numpy()
    predictions = classifier.judge(inputs, logits.detach())
    return [
        Explanation(prediction, {name: maps[i] for name, maps in heat.items()})
        for i, prediction in enumerate(predictions)
    ]


def forward_with_feature_map(network: nn.Module, inputs: Tensor, layer: str = LAST_LAYER) -> tuple[Tensor, Tensor]:
    """Run the network once and keep the output of one stage, so that its gradients can be computed.

    Many threads share the network, so a hook on it would also catch the pictures of other sessions.
    Therefore the hook is on an identity module made for this call, behind the stage, and the network
    stays untouched. The hook returns a new leaf tensor, so that the backward pass ends there and
    leaves no `.grad` on the network.

    Args:
        network: made by `model.build_network` or `model.for_inference`, frozen and in evaluation mode.
        inputs: shape (N, 3, S, S).
        layer: name of the stage.

    Returns:
        Logits of shape (N, 2), and the output of the stage, of shape (N, K, h, w).
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
    """Compute the maps of a method, of shape (N, h, w), times the number of cells.

    Grad-CAM averages over the cells. After the multiplication, the value of a cell is the logit that the
    picture would get if it looked like this cell everywhere.

    Args:
        logits: shape (N, classes), computed from `feature_map`.
        feature_map: shape (N, K, h, w), output of the method's layer.
        class_index: index of the class.
        method: one of `METHODS`.
    """
    (gradients,) = torch.autograd.grad(logits[:, class_index].sum(), feature_map, retain_graph=True)
    cells = feature_map.shape[2] * feature_map.shape[3]
    return METHODS[method].formula(feature_map.detach().float(), gradients.float()) * cells


def explain_by_occlusion(classifier: Classifier, inputs: Tensor) -> Explanation:
    """Explain one input of shape (3, S, S) by occlusion. Heat 1: occluding the cell leaves at most 1/e of the odds."""
    logits, drops = occlusion_sensitivity(classifier, inputs)
    (prediction,) = classifier.judge(inputs[None], logits)
    heat = {name: (drops if name == MEME else -drops).clip(0, 1) for name in classifier.classes}
    return Explanation(prediction, heat)


def occlusion_sensitivity(classifier: Classifier, inputs: Tensor) -> tuple[Tensor, NDArray[np.float32]]:
    """Occlude one square after another and measure how much the log-odds of meme drop.

    Zeiler and Fergus 2013, arXiv 1311.2901. The value of a cell is the mean over the squares that cover it.

    Args:
        classifier: the classifier to explain.
        inputs: one preprocessed picture of shape (3, S, S).

    Returns:
        The logits of the whole picture, of shape (1, 2), and the drops, of shape (`OCCLUSION_CELLS`,) * 2.
    """
    cell, cells, window = inputs.shape[-1] // OCCLUSION_CELLS, OCCLUSION_CELLS, OCCLUSION_WINDOW
    corners = [(row, column) for row in range(cells - window + 1) for column in range(cells - window + 1)]
    occluded = inputs.repeat(len(corners) + 1, 1, 1, 1)  # the last one stays whole
    for one, (row, column) in zip(occluded, corners, strict=False):
        one[:, row * cell : (row + window) * cell, column * cell : (column + window) * cell] = 0  # the mean colour
    with torch.inference_mode():
        logits = classifier.network(occluded).cpu()  # (squares + 1, 2)
    meme = classifier.classes.index(MEME)
    log_odds = (logits[:, meme] - logits[:, 1 - meme]).numpy() / classifier.temperature
    drops, counts = np.zeros((2, cells, cells), np.float32)
    for log_odds_occluded, (row, column) in zip(log_odds, corners, strict=False):
        square = np.s_[row : row + window, column : column + window]
        drops[square] += log_odds[-1] - log_odds_occluded
        counts[square] += 1
    return logits[-1:], drops / counts


@dataclass(frozen=True, slots=True)
class FaithfulnessCheck:
    """The probability of meme after parts of a picture are masked according to its heatmap.

    Attributes:
        masked_share: share of the picture inside its border that is masked: `MASKED_SHARE`, or less if less has heat.
        masked_picture: the picture with its strongest part blurred.
        blurred: probability of meme for that picture.
        mean_colour: probability with the strongest part filled with the picture's mean colour.
        control: probability with an equally large part blurred where the heatmap is weakest.
    """

    masked_share: float
    masked_picture: Image.Image
    blurred: float
    mean_colour: float
    control: float


def check_faithfulness(classifier: Classifier, picture: Image.Image, heat: NDArray[np.float32]) -> FaithfulnessCheck:
    """Mask the strongest and the weakest part of a heatmap in turn and classify again.

    A faithful heatmap makes the first probability change and the second one stay. A border is left alone, and the
    part inside it is classified by itself, because masking could create a border or break one.

    Args:
        classifier: the classifier that made the heatmap.
        picture: upright RGB.
        heat: heatmap of one class over the whole picture, as `explain` gives it.
    """
    left, top, right, bottom = content_box(picture) or (0, 0, *picture.size)
    rows, columns = heat.shape[0] / picture.height, heat.shape[1] / picture.width
    content = picture.crop((left, top, right, bottom))
    heat = heat[round(top * rows) : round(bottom * rows), round(left * columns) : round(right * columns)]
    blurred = content.filter(ImageFilter.GaussianBlur(max(content.size) / 12))
    filled = Image.new("RGB", content.size, mean_colour(content))
    strongest, weakest, share = top_and_bottom_masks(heat, content.size)
    masked = [
        Image.composite(replacement, content, mask)
        for replacement, mask in ((blurred, strongest), (filled, strongest), (blurred, weakest))
    ]
    squares = [resize_to_square(one, classifier.preprocessing.input_size) for one in masked]
    predictions = classifier.answer(classifier.preprocessing.normalise(squares))
    masked_picture = picture.copy()
    masked_picture.paste(masked[0], (left, top))
    return FaithfulnessCheck(share, masked_picture, *(prediction.meme_probability for prediction in predictions))


def faithfulness_verdict(before: float, masked: float, control: float) -> str:
    """Say whether a heatmap marks what the answer depends on.

    The measure is the relative fall of the probability without the strongest part, less the fall without the weakest.

    Args:
        before: probability of the class whose evidence is shown.
        masked: the same with the strongest part blurred.
        control: the same with the weakest part blurred.

    Returns:
        `HOLDS`, `PARTLY` or `FAILS`.
    """
    fall = (min(control, before) - masked) / before
    return HOLDS if fall >= LEAST_FALL[HOLDS] else PARTLY if fall >= LEAST_FALL[PARTLY] else FAILS


def top_and_bottom_masks(heat: NDArray[np.float32], size: tuple[int, int]) -> tuple[Image.Image, Image.Image, float]:
    """Masks of the strongest and the weakest part of a heatmap, and the share of the picture that each covers.

    Args:
        heat: shape (h, w).
        size: width and height of the masks in pixels.

    Returns:
        Two masks, white on black and equally large, and their share: at most `MASKED_SHARE`.
    """
    # Bilinear: bicubic would overshoot below zero beside a peak and above zero further out.
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)).ravel()
    count = min(round(MASKED_SHARE * smooth.size), int((smooth > 0).sum()))
    # Ties are broken at random: in pixel order they would mask the top of the picture, where captions are.
    order = np.lexsort((np.random.default_rng(0).random(smooth.size), -smooth))
    masks = []
    for chosen in (order[:count], order[len(order) - count :]):
        mask = np.zeros(smooth.size, np.uint8)
        mask[chosen] = 255
        masks.append(Image.fromarray(mask.reshape(size[1], size[0])))
    return masks[0], masks[1], count / smooth.size


def mean_colour(picture: Image.Image) -> tuple[int, ...]:
    """The mean of each channel of an RGB picture."""
    return tuple(np.asarray(picture).mean((0, 1)).round().astype(int).tolist())


def resize_heatmap(
    heat: NDArray[np.float32], size: tuple[int, int], rows: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Resize a heatmap to the size of its picture.

    The network saw the picture resized to a square, so resizing the map to the whole picture puts every
    cell on the part that it saw.

    Args:
        heat: shape (h, w).
        size: width and height of the picture in pixels.
        rows: first row to return and the row after the last one; all rows by default.

    Returns:
        Heat from 0 to 1, of shape (rows, width).
    """
    top, bottom = rows or (0, size[1])
    box = (0, top / size[1] * heat.shape[0], heat.shape[1], bottom / size[1] * heat.shape[0])
    resized = Image.fromarray(heat).resize((size[0], bottom - top), Image.Resampling.BICUBIC, box)
    return np.asarray(resized).clip(0, 1)  # bicubic overshoots a little


def overlay(
    picture: Image.Image, heat: NDArray[np.float32], opacity: float = OPACITY, colour_map: str = "jet"
) -> Image.Image:
    """Paint a heatmap over its picture.

    Args:
        picture: upright RGB.
        heat: shape (h, w), from 0 to 1.
        opacity: opacity of the colours where there is evidence, from 0 to 1.
        colour_map: one of `COLOUR_MAPS`.

    Returns:
        An RGB picture of the same size.
    """
    painted = picture.copy()
    for top in range(0, picture.height, ROWS_AT_ONCE):
        smooth = resize_heatmap(heat, picture.size, (top, min(top + ROWS_AT_ONCE, picture.height)))
        colours = Image.fromarray(COLOUR_MAPS[colour_map][(smooth * 255).astype(np.uint8)])
        mask = (opacity * (smooth / FADE_BELOW).clip(max=1) * 255).astype(np.uint8)
        painted.paste(colours, (0, top), Image.fromarray(mask))
    return painted


def outline(picture: Image.Image, box: tuple[int, int, int, int] | None) -> Image.Image:
    """A copy with a thin line around a box in pixels, or the picture itself without one."""
    if box is None:
        return picture
    outlined = picture.copy()
    width = max(2, round(max(picture.size) / 250))
    draw = ImageDraw.Draw(outlined)
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="black", width=2 * width)
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="#fbbf24", width=width)
    return outlined


def legend(colour_map: str = "jet") -> Image.Image:
    """The colours of an overlay from no evidence (left) to strong evidence (right), on grey."""
    heat = np.linspace(0, 1, LEGEND_SIZE[0], dtype=np.float32)[None]  # (1, width)
    return overlay(Image.new("RGB", LEGEND_SIZE, "#808080"), heat, opacity=1, colour_map=colour_map)


def encode_png(heatmap: Image.Image, classifier: Classifier, prediction: Prediction, label: str, method: str) -> bytes:
    """Encode a heatmap as PNG, with checkpoint, method, class and probability in its text chunks."""
    about = PngInfo()
    about.add_text("Software", "Meme Classifier")
    about.add_text("Checkpoint SHA-256", classifier.sha256)
    about.add_text("Method", method)
    about.add_text("Evidence for", label)
    about.add_text("Probability of meme", f"{prediction.meme_probability:.4f}")
    buffer = BytesIO()
    heatmap.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def overlay_png(classifier: Classifier, picture: Image.Image, explanation: Explanation) -> bytes:
    """Paint the Grad-CAM of the predicted class over a picture and encode it as PNG."""
    label = explanation.prediction.label
    return encode_png(overlay(picture, explanation.heat[label]), classifier, explanation.prediction, label, GRAD_CAM)
