"""Measure whether heatmaps show what matters: python -m evaluation.faithfulness DATA_DIR --json FILE

Each method is compared with two controls that know nothing of the picture, a random map and a spot in the middle,
and with pytorch-grad-cam's Grad-CAM on torchvision's network, the usual implementation. Needs requirements-dev.txt.
"""

import argparse
import copy
import json
import math
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from borders import content_box
from engine import usable_cores
from evaluation.dataset import open_batches, plain_network, read_folder
from evaluation.metrics import Array, bootstrap, share
from evaluation.robustness import SEED, balanced_sample, jpeg
from gradcam import METHODS, OCCLUSION, evidence, forward_with_feature_map, occlusion_sensitivity, resize_heatmap
from model import DEFAULT_CHECKPOINT, MEME, NOT_MEME, BadCheckpoint, Classifier, as_stages, for_inference

PICTURES = 60  # with two free cores, this takes about a quarter of an hour
STEPS = 14  # of a deletion or insertion curve; 28 move the mean area by 0.0004
ROAD_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the pixels that are removed
ROAD_NOISE = 0.01
SANITY_PICTURES = 20
BATCH = 32
CAPTIONS = (
    "NOBODY", "WHEN IT WORKS", "ONE DOES NOT SIMPLY", "ME ON MONDAY", "WHAT IF I TOLD YOU", "WAIT FOR IT",
    "THIS IS FINE", "SAID NO ONE EVER", "FIVE MINUTES LATER", "AND THEN I SAID", "STILL WAITING", "NOT TODAY",
)  # fmt: skip
CAPTION_HEIGHT = {1: (0.14, 0.24), 2: (0.1, 0.12)}  # share of the picture's, by number; at most a quarter in all
FONT = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold"))
LIBRARY = "pytorch-grad-cam"
CONTROLS = ("random", "centred spot")

Heat = NDArray[np.float32]
# (network input of shape (3, S, S), class name) -> map of shape (h, w), never negative
Explainer = Callable[[Tensor, str], Heat]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


Scores = dict[str, Interval]


@dataclass(frozen=True, slots=True)
class Case:
    """A picture to explain.

    Attributes:
        picture: upright RGB.
        label: the class whose evidence is explained.
        captions: boxes (left, top, right, bottom) as shares of the sides; empty where they are unknown.
    """

    picture: Image.Image
    label: str
    captions: tuple[tuple[float, float, float, float], ...] = ()


def explain_by_gradient(classifier: Classifier, method: str, inputs: Tensor, label: str) -> Heat:
    """The map of one of `METHODS`, not scaled and with no upper end."""
    logits, feature_map = forward_with_feature_map(classifier.network, inputs[None], METHODS[method].layer)
    return np.asarray(evidence(logits, feature_map, classifier.classes.index(label), method)[0])


def build_explainers(classifier: Classifier, plain: nn.Module) -> dict[str, Explainer]:
    """Every method and what it is compared with.

    Args:
        classifier: whose answers to explain.
        plain: torchvision's network with the same weights, for pytorch-grad-cam, which registers hooks on it.
    """
    library = GradCAM(plain, [plain.get_submodule("features.norm5")])

    def gradient(method: str) -> Explainer:
        return lambda inputs, label: explain_by_gradient(classifier, method, inputs, label)

    def occlusion(inputs: Tensor, label: str) -> Heat:
        _, falls = occlusion_sensitivity(classifier, inputs)
        return (falls if label == MEME else -falls).clip(0)

    def random_map(inputs: Tensor, _label: str) -> Heat:
        draw = np.random.default_rng(zlib.crc32(inputs.numpy().tobytes()))  # the same for the same input
        return draw.random((inputs.shape[1] // 32,) * 2, np.float32)

    def centred_spot(_inputs: Tensor, _label: str) -> Heat:
        y, x = np.mgrid[-1:1:16j, -1:1:16j]
        heat: Heat = np.exp(-(x**2 + y**2) / 0.5).astype(np.float32)
        return heat

    return {
        **{method: gradient(method) for method in METHODS},
        OCCLUSION: occlusion,
        LIBRARY: lambda inputs, label: library(inputs[None], [ClassifierOutputTarget(classifier.classes.index(label))])[
            0
        ],
        "random": random_map,
        "centred spot": centred_spot,
    }


def resize_heat(heat: Heat, size: int) -> Heat:
    """The heat over an input of this size, its highest value 1."""
    return resize_heatmap(heat / np.float32(max(float(heat.max()), 1e-12)), (size, size))


def rank_pixels(heat: Heat, size: int) -> Array:
    """Indices of the pixels of an input of this size, from most heat to least; equal ones in random order."""
    smooth = resize_heat(heat, size).ravel()
    return np.lexsort((np.random.default_rng(SEED).random(smooth.size), -smooth))


def probabilities(classifier: Classifier, inputs: Tensor, label: str) -> Array:
    """The probability of a class for inputs of shape (N, 3, S, S), of shape (N,)."""
    with torch.inference_mode():
        logits = torch.cat([classifier.network(part) for part in inputs.split(BATCH)])
    meme = np.array([prediction.meme_probability for prediction in classifier.read_logits(logits)])
    return meme if label == MEME else 1 - meme


def substrates(inputs: Tensor) -> dict[str, Tensor]:
    """What replaces removed pixels, of the shape of the input."""
    size = inputs.shape[-1]
    return {
        "blur": gaussian_blur(inputs, [size // 3 | 1] * 2, [size / 12] * 2),
        "mean colour": inputs.mean((1, 2), keepdim=True).expand_as(inputs),
    }


def curve_areas(classifier: Classifier, inputs: Tensor, heat: Heat, label: str) -> dict[str, float]:
    """Areas under deletion and insertion curves (Petsiuk et al. 2018, RISE, arXiv 1806.07421)."""
    order = torch.from_numpy(rank_pixels(heat, inputs.shape[-1]))
    ends = np.linspace(0, len(order), STEPS + 1).round().astype(int)
    areas = {}
    for name, substrate in substrates(inputs).items():
        for kind, start, goal in (("deletion", inputs, substrate), ("insertion", substrate, inputs)):
            steps = []
            for end in ends:
                step = start.flatten(1).clone()
                step[:, order[:end]] = goal.flatten(1)[:, order[:end]]
                steps.append(step.view_as(inputs))
            curve = probabilities(classifier, torch.stack(steps), label)
            areas[f"{kind}, {name}"] = float(np.trapezoid(curve, dx=1 / STEPS))
    return areas


@cache
def neighbour_equations(size: int) -> Any:
    """One row for each pixel of a square: the weights of its neighbours, and minus their sum for itself.

    1/6 for a neighbour at a side and 1/12 at a corner, as in ROAD (Rong et al. 2022, arXiv 2202.00449, section 4).

    Returns:
        A sparse array of shape (size², size²).
    """
    one, beside = sparse.eye_array(size), sparse.eye_array(size, k=1) + sparse.eye_array(size, k=-1)
    weights = (sparse.kron(one, beside) + sparse.kron(beside, one)) / 6 + sparse.kron(beside, beside) / 12
    return sparse.csr_array(weights - sparse.diags_array(weights.sum(axis=1)))


def impute(inputs: Tensor, removed: Array) -> Tensor:
    """Replace pixels so that each is the weighted mean of its neighbours, as ROAD does, without its noise.

    The equations of pytorch-grad-cam's `NoisyLinearImputer`; with slices of one sparse array and an ordering for
    symmetric patterns, they take a third of its time.

    Args:
        inputs: shape (3, S, S).
        removed: indices of pixels, shape (K,).
    """
    pixels = inputs.flatten(1).T.double().numpy().copy()  # (S * S, 3)
    removed, kept = np.sort(removed), np.setdiff1d(np.arange(len(pixels)), removed)
    equations = neighbour_equations(inputs.shape[-1])[removed]
    factors = splu(equations[:, removed].tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    pixels[removed] = factors.solve(-(equations[:, kept] @ pixels[kept]))
    return torch.from_numpy(pixels.T).float().view_as(inputs)


def road(classifier: Classifier, inputs: Tensor, heat: Heat, label: str) -> float:
    """ROAD: (least relevant first - most relevant first) / 2 (Rong et al. 2022, arXiv 2202.00449)."""
    order = rank_pixels(heat, inputs.shape[-1])
    noise = torch.Generator().manual_seed(SEED)
    imputed = []
    for wanted in (order[::-1], order):
        for part in ROAD_SHARES:
            removed = wanted[: round(part * len(order))]
            filled = impute(inputs, removed).flatten(1)
            filled[:, removed.copy()] += ROAD_NOISE * torch.randn(3, len(removed), generator=noise)
            imputed.append(filled.view_as(inputs))
    least, most = probabilities(classifier, torch.stack(imputed), label).reshape(2, -1).mean(1)
    return float(least - most) / 2


def localisation(case: Case, heat: Heat, size: int) -> dict[str, float]:
    """Whether the strongest place lies in a caption, the share of the heat that does, and of the area.

    Pointing game: Zhang et al. 2018, arXiv 1608.00507, without its tolerance. The place is the middle of the
    strongest cell: stretched over the picture, a map has its peak at the very edge if that cell is an outer one.
    """
    smooth = resize_heat(heat, size)
    strongest = np.argwhere(heat == heat.max()).mean(0)  # pytorch-grad-cam's maps are stretched, their peaks flat
    y, x = (strongest + 0.5) / heat.shape
    hit = any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in case.captions)
    inside = np.zeros((size, size), bool)
    for left, top, right, bottom in case.captions:
        inside[round(top * size) : round(bottom * size), round(left * size) : round(right * size)] = True
    return {
        "pointing game": float(hit and heat.max() > 0),
        "energy in captions": float(smooth[inside].sum() / max(float(smooth.sum()), 1e-12)),
        "area of captions": float(inside.mean()),
    }


def relative_change(before: Heat, after: Heat) -> float:
    """How far one map is from another, relative to the length of the first."""
    return float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-12))


def shift_right(inputs: Tensor) -> Tensor:
    """The input moved right by one of its pixels, its left edge repeated."""
    return torch.cat([inputs[:, :, :1], inputs[:, :, :-1]], 2)


def add_caption(picture: Image.Image, draw: random.Random) -> Case:
    """Write a caption over the top of a picture, the bottom, or both, and remember where."""
    written = picture.copy()
    edges = draw.choice((("top",), ("bottom",), ("top", "bottom")))
    height = round(draw.uniform(*CAPTION_HEIGHT[len(edges)]) * picture.height)
    boxes = []
    for edge in edges:
        font = ImageFont.truetype(FONT, 60)
        text = draw.choice(CAPTIONS)
        left, top, right, bottom = (round(side) for side in font.getbbox(text, stroke_width=5))
        line = Image.new("RGBA", (right - left, bottom - top))
        ImageDraw.Draw(line).text((-left, -top), text, "white", font, stroke_width=5, stroke_fill="black")
        line = line.resize((min(round(line.width * height / line.height), round(0.94 * picture.width)), height))
        x, y = (picture.width - line.width) // 2, 4 if edge == "top" else picture.height - height - 4
        written.paste(line, (x, y), line)
        box = (x / picture.width, y / picture.height, (x + line.width) / picture.width, (y + height) / picture.height)
        boxes.append(box)
    return Case(written, MEME, tuple(boxes))


def randomise_stages(plain: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The network with more and more stages made random, from the last to the first.

    Cascading randomisation: Adebayo et al. 2018, "Sanity Checks for Saliency Maps", arXiv 1810.03292.

    Args:
        plain: torchvision's DenseNet; it is not changed.

    Yields:
        The name of the stage that was made random last, and the network, ready for inference.
    """
    torch.manual_seed(SEED)
    network = as_stages(copy.deepcopy(plain))
    stages = [("classifier", network.get_submodule("classifier"))]
    stages += list(reversed(list(network.get_submodule("features").named_children())))
    for name, stage in stages:
        found = [module for module in stage.modules() if hasattr(module, "reset_parameters")]
        for module in found:
            module.reset_parameters()  # type: ignore[operator]
        if found and not name.startswith(("norm", "transition")):
            yield name, for_inference(network)


def correlation(one: Heat, other: Heat) -> float:
    """Pearson's correlation of two maps; NaN where one of them is flat."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) if one.std() and other.std() else math.nan


def score(classifier: Classifier, explainer: Explainer, case: Case) -> dict[str, float]:
    """Every score of one explainer on one picture: of localisation where captions are known, else all others."""
    inputs = classifier.preprocessing(case.picture)
    heat = explainer(inputs, case.label)
    if case.captions:
        return localisation(case, heat, inputs.shape[-1])
    stored = classifier.preprocessing(jpeg(case.picture, 90))
    return {
        **curve_areas(classifier, inputs, heat, case.label),
        "ROAD": road(classifier, inputs, heat, case.label),
        "change, 1 pixel": relative_change(heat, explainer(shift_right(inputs), case.label)),
        "change, JPEG 90": relative_change(heat, explainer(stored, case.label)),
    }


def measure(classifier: Classifier, plain: nn.Module, cases: list[Case]) -> dict[str, Scores]:
    """The mean of every score of every explainer.

    Each thread takes one picture at a time, on one core. It has explainers of its own, because the hooks of
    pytorch-grad-cam would catch other threads' pictures.

    Args:
        classifier: whose heatmaps to measure.
        plain: torchvision's network with the same weights.
        cases: pictures with the label that the classifier gives them, and memes with captions at known places.
    """
    own = threading.local()

    def score_all(case: Case) -> dict[str, dict[str, float]]:
        if not hasattr(own, "explainers"):
            own.explainers = build_explainers(classifier, copy.deepcopy(plain))
        return {name: score(classifier, explainer, case) for name, explainer in own.explainers.items()}

    with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        rows = list(tqdm(pool.map(score_all, cases), desc="Scoring", total=len(cases), unit="picture"))
    table: dict[str, Scores] = {}
    for name in rows[0]:
        names = dict.fromkeys(one for row in rows for one in row[name])
        table[name] = {one: mean([row[name][one] for row in rows if one in row[name]]) for one in names}
    return table


def mean(values: list[float]) -> Interval:
    """The mean with its bootstrap interval."""
    array = np.array(values)
    return Interval(*astuple(bootstrap(lambda chosen: float(array[chosen].mean()), len(array))))


def measure_sanity(classifier: Classifier, plain: nn.Module, cases: list[Case]) -> dict[str, dict[str, float | None]]:
    """The mean correlation of each method's maps with those of a network that is random from each stage on.

    Flat maps have no correlation and are left out; None where all are flat.
    """
    pairs = [(classifier.preprocessing(case.picture), case.label) for case in cases]
    before = {name: [explain_by_gradient(classifier, name, *pair) for pair in pairs] for name in METHODS}
    table: dict[str, dict[str, float | None]] = {name: {} for name in METHODS}
    for stage, network in tqdm(randomise_stages(plain), desc="Randomised", unit="stage"):
        random_classifier = replace(classifier, network=network, exact=None)
        for name, maps in before.items():
            after = [explain_by_gradient(random_classifier, name, *pair) for pair in pairs]
            found = [value for both in zip(maps, after, strict=True) if not math.isnan(value := correlation(*both))]
            table[name][stage] = float(np.mean(found)) if found else None
    return table


def lower_is_better(name: str) -> bool:
    """Of areas under deletion curves and of changes; all else should be high."""
    return name.startswith(("deletion", "change"))


def beats_controls(method: str, name: str, table: dict[str, Scores]) -> bool:
    """Whether a score's interval lies on the better side of both controls' intervals.

    Always false for changes: a spot in the middle never changes, and says nothing.
    """
    if name.startswith("change"):
        return False
    found, others = table[method][name], [table[control][name] for control in CONTROLS]
    if lower_is_better(name):
        return all(found.high < other.low for other in others)
    return all(found.low > other.high for other in others)


def shown_scores(table: dict[str, Scores]) -> list[str]:
    """The scores of the methods; the area of the captions is the same for all."""
    return [name for name in next(iter(table.values())) if name != "area of captions"]


def to_markdown(table: dict[str, Scores]) -> str:
    """The scores as a Markdown table; bold where a method is better than both controls."""
    shown = shown_scores(table)
    lines = ["| method | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for method, scores in table.items():
        cells = []
        for name in shown:
            found = scores[name]
            text = f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"
            cells.append(f"**{text}**" if method not in CONTROLS and beats_controls(method, name, table) else text)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_scores(path: Path, table: dict[str, Scores], sanity: dict[str, dict[str, float | None]]) -> None:
    """Plot each score's intervals by method, and the correlation with maps of randomised networks."""
    shown = shown_scores(table)
    figure = Figure(figsize=(22, 9), layout="constrained")
    axes = list(figure.subplots(2, 5).flat)
    for ax, name in zip(axes, shown, strict=False):
        found = [scores[name] for scores in table.values()]
        value = np.array([estimate.value for estimate in found])
        spread = np.array([(estimate.value - estimate.low, estimate.high - estimate.value) for estimate in found]).T
        colours = ["tab:grey" if method in CONTROLS else "tab:blue" for method in table]
        ax.barh(range(len(table)), value, xerr=spread.clip(0), color=colours)
        better = "lower" if lower_is_better(name) else "higher"
        ax.set(title=name, xlabel=f"{better} is better", yticks=range(len(table)), yticklabels=list(table))
        ax.invert_yaxis()
    last = axes[len(shown)]
    for method, row in sanity.items():
        last.plot(list(row), [math.nan if value is None else value for value in row.values()], marker=".", label=method)
    last.set(title="randomised weights", ylabel="correlation with the maps before", ylim=(-0.5, 1))
    last.tick_params(axis="x", rotation=45)
    last.legend()
    figure.savefig(path, dpi=70)


def main() -> int:
    """Read the command line, measure, print, write; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.faithfulness", description="Measure whether heatmaps show what matters."
    )
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="how many of DATA, and how many drawn memes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("outputs/faithfulness.png"))
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    arguments = parser.parse_args()

    labelled = read_folder(arguments.data)
    if {picture.label for picture in labelled} != {MEME, NOT_MEME}:
        parser.error(f"there must be pictures below both {arguments.data}/meme and {arguments.data}/not_meme")
    photos = [picture for picture in labelled if picture.group == "photo"]
    if not photos:
        parser.error(f"there must be photos to write captions on, in folders {arguments.data}/not_meme/photo__...")
    try:
        classifier = Classifier.load(arguments.checkpoint)
    except BadCheckpoint as error:
        parser.error(str(error))
    plain = plain_network(arguments.checkpoint)

    opened = [p for _, batch in open_batches(balanced_sample(labelled, arguments.pictures // 2)) for p in batch]
    cases = [Case(p, prediction.label) for p, prediction in zip(opened, classifier.predict(opened), strict=True)]
    draw = random.Random(SEED)
    backgrounds = [
        p.crop(content_box(p))
        for _, batch in open_batches(draw.sample(photos, min(arguments.pictures, len(photos))))
        for p in batch
    ]
    # If a border is cropped from the result, the captions are no longer where they were written.
    memes = [meme for picture in backgrounds if not content_box((meme := add_caption(picture, draw)).picture)]
    table = measure(classifier, plain, cases + memes)
    sanity = measure_sanity(classifier, plain, cases[:: max(1, len(cases) // SANITY_PICTURES)])
    print(to_markdown(table))
    found = classifier.predict([case.picture for case in memes])
    called = share(np.array([prediction.label == MEME for prediction in found])).value
    covered = table["random"]["area of captions"].value
    print(f"{called:.0%} of the drawn memes are called memes; their captions cover {covered:.0%} of the picture")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {method: {name: asdict(value) for name, value in scores.items()} for method, scores in table.items()}
        about = {
            "checkpoint_sha256": classifier.sha256,
            "pictures": len(cases),
            "drawn_memes": len(memes),
            "seed": SEED,
        }
        written = about | {"scores": rows, "randomised": sanity}
        arguments.json.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot_scores(arguments.plot, table, sanity)
    return 0


if __name__ == "__main__":
    sys.exit(main())
