"""Measure whether the heatmaps are true: python -m evaluation.faithfulness DATA_DIR --json FILE

Each method is measured beside a random map and a spot in the middle, which know nothing of the picture,
and beside pytorch-grad-cam's Grad-CAM on torchvision's network, the usual way to do it. Needs
requirements-dev.txt.
"""

import argparse
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.road import NoisyLinearImputer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from borders import content_box
from evaluation.dataset import open_batches, plain_network, read_folder
from evaluation.metrics import Array, bootstrap, share
from evaluation.robustness import SEED, jpeg, sample
from gradcam import METHODS, OCCLUSION, evidence, forward_with_feature_map, occlusion_sensitivity, resize_heatmap
from model import (
    DEFAULT_CHECKPOINT,
    MEME,
    NOT_MEME,
    BadCheckpoint,
    Classifier,
    build_network,
    for_inference,
)

STEPS = 28  # of a deletion or insertion curve
ROAD_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the pixels that are taken away
ROAD_NOISE = 0.01
BATCH = 32
CAPTIONS = (
    "NOBODY", "WHEN IT WORKS", "ONE DOES NOT SIMPLY", "ME ON MONDAY", "WHAT IF I TOLD YOU", "WAIT FOR IT",
    "THIS IS FINE", "SAID NO ONE EVER", "FIVE MINUTES LATER", "AND THEN I SAID", "STILL WAITING", "NOT TODAY",
)  # fmt: skip
CAPTION_HEIGHT = {1: (0.14, 0.24), 2: (0.1, 0.12)}  # of the picture's, by number; never more than a quarter of it
FONT = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold"))

CONTROLS = ("random", "centred spot")


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float


Scores = dict[str, Interval]
Heat = NDArray[np.float32]
# A heatmap's maker: the network's input of shape (3, S, S) and a class -> map of shape (h, w), never negative.
Maker = Callable[[Tensor, str], Heat]


@dataclass(frozen=True, slots=True)
class Case:
    """One picture, the class whose evidence is asked for, and where its captions are (none: unknown)."""

    picture: Image.Image
    label: str
    captions: tuple[tuple[float, float, float, float], ...] = ()  # left, top, right, bottom, from 0 to 1


def makers(classifier: Classifier, checkpoint: Path) -> dict[str, Maker]:
    """Every method, and what it is measured against."""

    def ours(method: str) -> Maker:
        def make(inputs: Tensor, label: str) -> Heat:
            logits, feature_map = forward_with_feature_map(classifier.network, inputs[None], METHODS[method].layer)
            return np.asarray(evidence(logits, feature_map, classifier.classes.index(label), method)[0])

        return make

    theirs = plain_network(checkpoint)
    library = GradCAM(theirs, [theirs.get_submodule("features.norm5")])
    draw = np.random.default_rng(SEED)

    def by_occlusion(inputs: Tensor, label: str) -> Heat:
        _, falls = occlusion_sensitivity(classifier, inputs)  # unlike the page's, with no upper end
        return (falls if label == MEME else -falls).clip(0)

    def spot(_inputs: Tensor, _label: str) -> Heat:
        y, x = np.mgrid[-1:1:16j, -1:1:16j]
        heat: Heat = np.exp(-(x**2 + y**2) / 0.5).astype(np.float32)
        return heat

    return {
        **{method: ours(method) for method in METHODS},
        OCCLUSION: by_occlusion,
        "pytorch-grad-cam": lambda inputs, label: library(
            inputs[None], [ClassifierOutputTarget(classifier.classes.index(label))]
        )[0],
        "random": lambda inputs, _: draw.random((inputs.shape[1] // 32,) * 2, np.float32),
        "centred spot": spot,
    }


def at_size(heat: Heat, size: int) -> Heat:
    """The heat over an input of this size, its highest value 1."""
    return resize_heatmap(heat / np.float32(max(float(heat.max()), 1e-12)), (size, size))


def ranking(heat: Heat, size: int) -> Array:
    """Indices of the pixels of an input of this size, from most heat to least; equal ones in random order."""
    smooth = at_size(heat, size).ravel()
    return np.lexsort((np.random.default_rng(SEED).random(smooth.size), -smooth))


def probabilities(classifier: Classifier, inputs: Tensor, label: str) -> Array:
    """The probability of a class for inputs of shape (N, 3, S, S), of shape (N,)."""
    with torch.inference_mode():
        logits = torch.cat([classifier.network(part) for part in inputs.split(BATCH)])
    meme = np.array([prediction.meme_probability for prediction in classifier.read_logits(logits)])
    return meme if label == MEME else 1 - meme


def substrates(inputs: Tensor) -> dict[str, Tensor]:
    """What stands in for pixels that are taken away, of the shape of the input."""
    size = inputs.shape[-1]
    return {
        "blur": gaussian_blur(inputs, [size // 3 | 1] * 2, [size / 12] * 2),
        "mean colour": inputs.mean((1, 2), keepdim=True).expand_as(inputs),
    }


def curves(classifier: Classifier, inputs: Tensor, heat: Heat, label: str) -> dict[str, float]:
    """Areas under deletion and insertion curves (Petsiuk et al. 2018, RISE, arXiv 1806.07421)."""
    order = torch.from_numpy(ranking(heat, inputs.shape[-1]))
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


def road(classifier: Classifier, inputs: Tensor, heat: Heat, label: str) -> float:
    """ROAD: (least relevant first - most relevant first) / 2 (Rong et al. 2022, arXiv 2202.00449)."""
    order = ranking(heat, inputs.shape[-1])
    impute = NoisyLinearImputer(ROAD_NOISE)
    torch.manual_seed(SEED)
    imputed = []
    for wanted in (order[::-1], order):
        for part in ROAD_SHARES:
            kept = torch.ones(len(order))
            kept[torch.from_numpy(wanted[: round(part * len(order))].copy())] = 0
            imputed.append(impute(inputs, kept.view(inputs.shape[1:])))
    least, most = probabilities(classifier, torch.stack(imputed), label).reshape(2, -1).mean(1)
    return float(least - most) / 2


def pointing(case: Case, heat: Heat, size: int) -> dict[str, float]:
    """Whether the strongest place lies in a caption, the share of the heat that does, and of the area.

    Pointing game: Zhang et al. 2018, arXiv 1608.00507, without its tolerance. The place is the middle of the
    strongest cell: stretched over the picture, a map has its peak at the very edge if that cell is an outer one.
    """
    smooth = at_size(heat, size)
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


def change(maker: Maker, inputs: Tensor, altered: Tensor, label: str) -> float:
    """How far the map of an altered input is from that of the input, relative to that map's length."""
    before, after = maker(inputs, label), maker(altered, label)
    return float(np.linalg.norm(after - before) / max(float(np.linalg.norm(before)), 1e-12))


def shifted(inputs: Tensor) -> Tensor:
    """The input moved right by one of its pixels, its left edge repeated."""
    return torch.cat([inputs[:, :, :1], inputs[:, :, :-1]], 2)


def caption(picture: Image.Image, draw: random.Random) -> Case:
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


def randomised(checkpoint: Path) -> Iterator[tuple[str, nn.Module]]:
    """The network with more and more stages made random, from the last to the first.

    Adebayo et al. 2018, "Sanity Checks for Saliency Maps", arXiv 1810.03292.
    """
    torch.manual_seed(SEED)
    network = build_network()
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
    stages = [("classifier", network.get_submodule("classifier"))]
    stages += list(reversed(list(network.get_submodule("features").named_children())))
    for name, stage in stages:
        found = [module for module in stage.modules() if hasattr(module, "reset_parameters")]
        for module in found:
            module.reset_parameters()  # type: ignore[operator]
        if found and not name.startswith(("norm", "transition")):
            yield name, for_inference(network)


def likeness(one: Heat, other: Heat) -> float:
    """Pearson's correlation of two maps; NaN where one of them is flat."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) if one.std() and other.std() else math.nan


def measure(classifier: Classifier, checkpoint: Path, cases: list[Case], memes: list[Case]) -> dict[str, Scores]:
    """Every score of every maker.

    Args:
        classifier: whose heatmaps to measure.
        checkpoint: its file.
        cases: real pictures, with the label that the classifier gives them.
        memes: pictures with captions at known places.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for name, maker in makers(classifier, checkpoint).items():
        scores = values[name] = defaultdict(list)
        for case in tqdm(cases, desc=name, unit="picture"):
            inputs = classifier.preprocessing(case.picture)
            heat = maker(inputs, case.label)
            for score, value in curves(classifier, inputs, heat, case.label).items():
                scores[score].append(value)
            scores["ROAD"].append(road(classifier, inputs, heat, case.label))
            stored = classifier.preprocessing(jpeg(case.picture, 90))
            scores["change, 1 pixel"].append(change(maker, inputs, shifted(inputs), case.label))
            scores["change, JPEG 90"].append(change(maker, inputs, stored, case.label))
        for case in memes:
            inputs = classifier.preprocessing(case.picture)
            for score, value in pointing(case, maker(inputs, case.label), inputs.shape[-1]).items():
                scores[score].append(value)
    return {name: {score: mean(found) for score, found in scores.items()} for name, scores in values.items()}


def mean(values: list[float]) -> Interval:
    """The mean with its bootstrap interval."""
    array = np.array(values)
    return Interval(*astuple(bootstrap(lambda chosen: float(array[chosen].mean()), len(array))))


def measure_sanity(classifier: Classifier, checkpoint: Path, cases: list[Case]) -> dict[str, dict[str, float | None]]:
    """The mean likeness of each method's maps to those of a network that is random from each stage on.

    Flat maps, which are like nothing, are left out; None where all are.
    """
    before = {name: make for name, make in makers(classifier, checkpoint).items() if name in METHODS}
    table: dict[str, dict[str, float | None]] = {name: {} for name in before}
    inputs = [classifier.preprocessing(case.picture) for case in cases]
    for stage, network in tqdm(randomised(checkpoint), desc="randomised", unit="stage"):
        after = makers(replace(classifier, network=network, exact=None), checkpoint)
        for name, make in before.items():
            pairs = [
                (make(one, case.label), after[name](one, case.label)) for one, case in zip(inputs, cases, strict=True)
            ]
            found = [value for pair in pairs if not math.isnan(value := likeness(*pair))]
            table[name][stage] = float(np.mean(found)) if found else None
    return table


def lower_is_better(score: str) -> bool:
    """Of areas under deletion curves and of changes; all else should be high."""
    return score.startswith(("deletion", "change"))


def beats_controls(name: str, score: str, table: dict[str, Scores]) -> bool:
    """Whether the interval lies on the better side of both controls' intervals.

    Not asked of changes: a spot in the middle never changes, and says nothing.
    """
    if score.startswith("change"):
        return False
    low, high = table[name][score].low, table[name][score].high
    others = [table[control][score] for control in CONTROLS]
    if lower_is_better(score):
        return all(high < other.low for other in others)
    return all(low > other.high for other in others)


def to_markdown(table: dict[str, Scores], shown: list[str] | None = None) -> str:
    """The scores, or some of them, as a Markdown table; bold where a method is better than both controls."""
    shown = shown or [score for score in next(iter(table.values())) if score != "area of captions"]
    lines = ["| method | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, scores in table.items():
        cells = []
        for score in shown:
            found = scores[score]
            text = f"{found.value:.3f} ({found.low:.3f}–{found.high:.3f})"
            cells.append(f"**{text}**" if name not in CONTROLS and beats_controls(name, score, table) else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_scores(path: Path, table: dict[str, Scores], sanity: dict[str, dict[str, float | None]]) -> None:
    """Draw each score's intervals by method, and the likeness to randomised networks."""
    shown = [score for score in next(iter(table.values())) if score != "area of captions"]
    figure = Figure(figsize=(22, 9), layout="constrained")
    axes = list(figure.subplots(2, 5).flat)
    for ax, score in zip(axes, shown, strict=False):
        found = [table[name][score] for name in table]
        value = np.array([estimate.value for estimate in found])
        spread = np.array([(estimate.value - estimate.low, estimate.high - estimate.value) for estimate in found]).T
        colours = ["tab:grey" if name in CONTROLS else "tab:blue" for name in table]
        ax.barh(range(len(table)), value, xerr=spread.clip(0), color=colours)
        better = "lower" if lower_is_better(score) else "higher"
        ax.set(title=score, xlabel=f"{better} is better", yticks=range(len(table)), yticklabels=list(table))
        ax.invert_yaxis()
    last = axes[len(shown)]
    for name, row in sanity.items():
        last.plot(list(row), [math.nan if value is None else value for value in row.values()], marker=".", label=name)
    last.set(title="randomised weights", ylabel="likeness to the maps before", ylim=(-0.5, 1))
    last.tick_params(axis="x", rotation=45)
    last.legend()
    figure.savefig(path, dpi=70)


def main() -> int:
    """Read the command line, measure, print, write; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Measure whether the heatmaps are true.")
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--pictures", type=int, default=100, help="how many of DATA, and how many drawn memes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("outputs/faithfulness.png"))
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    arguments = parser.parse_args()

    labelled = read_folder(arguments.data)
    if {picture.label for picture in labelled} != {MEME, NOT_MEME}:
        parser.error(f"there must be pictures below both {arguments.data}/meme and {arguments.data}/not_meme")
    try:
        classifier = Classifier.load(arguments.checkpoint)
    except BadCheckpoint as error:
        parser.error(str(error))

    opened = [p for _, batch in open_batches(sample(labelled, arguments.pictures // 2)) for p in batch]
    cases = [Case(p, prediction.label) for p, prediction in zip(opened, classifier.predict(opened), strict=True)]
    photos = [picture for picture in labelled if picture.group == "photo"]
    if not photos:
        parser.error(f"there must be photos to write captions on, in folders {arguments.data}/not_meme/photo__...")
    draw = random.Random(SEED)
    backgrounds = [
        p.crop(content_box(p))
        for _, batch in open_batches(draw.sample(photos, min(arguments.pictures, len(photos))))
        for p in batch
    ]
    # A frame inside the frame would move the captions' places.
    memes = [meme for picture in backgrounds if not content_box((meme := caption(picture, draw)).picture)]
    table = measure(classifier, arguments.checkpoint, cases, memes)
    sanity = measure_sanity(classifier, arguments.checkpoint, cases[:: max(1, len(cases) // 20)])
    print(to_markdown(table))
    found = classifier.predict([case.picture for case in memes])
    called = share(np.array([prediction.label == MEME for prediction in found])).value
    covered = table["random"]["area of captions"].value
    print(f"{called:.0%} of the drawn memes are called memes; their captions cover {covered:.0%} of the picture")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: {score: asdict(value) for score, value in scores.items()} for name, scores in table.items()}
        about = {
            "checkpoint_sha256": classifier.sha256,
            "pictures": len(cases),
            "drawn_memes": len(memes),
            "seed": SEED,
        }
        written = about | {"scores": rows, "randomised": sanity}
        arguments.json.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n")
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    draw_scores(arguments.plot, table, sanity)
    return 0


if __name__ == "__main__":
    sys.exit(main())
