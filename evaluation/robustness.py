"""Measure how corruptions change the answers: python -m evaluation.robustness DATA_DIR --json FILE

Every picture of a seeded sample is classified clean, and after each corruption at each severity. Besides the
accuracy, the flip rate is measured: the share of pictures whose label changes, right or wrong.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

from engine import usable_cores
from evaluation.dataset import LabelledPicture, open_batches, read_folder
from evaluation.metrics import Estimate, share
from model import CLASSES, DEFAULT_CHECKPOINT, MEME, NOT_MEME, BadCheckpoint, Classifier, Prediction

BATCH = 32
SIDE = 264  # pixels of the longest side at most, so that severities in pixels mean the same everywhere
SEED = 0


def jpeg(picture: Image.Image, quality: float) -> Image.Image:
    """Save as JPEG."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=int(quality))
    return Image.open(buffer, formats=("JPEG",)).convert("RGB")


def shrink(picture: Image.Image, factor: float) -> Image.Image:
    """Scale down by a factor and up again."""
    small = picture.resize([max(1, round(side / factor)) for side in picture.size], Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.BILINEAR)


def crop(picture: Image.Image, part: float) -> Image.Image:
    """Crop a part of the width and of the height, half of it on each side."""
    x, y = (round(side * part / 2) for side in picture.size)
    return picture.crop((x, y, picture.width - x, picture.height - y))


def border(picture: Image.Image, part: float) -> Image.Image:
    """Add a white border, as wide as a part of the longest side."""
    return ImageOps.expand(picture, round(part * max(picture.size)), "white")


def letterbox(picture: Image.Image, part: float) -> Image.Image:
    """Add black bars above and below, each a part of the height."""
    return ImageOps.expand(picture, (0, round(part * picture.height)), "black")


def screenshot(picture: Image.Image, scale: float) -> Image.Image:
    """Show on a phone whose height is a multiple of the picture's width: status bar above, buttons below."""
    width, height = picture.width, round(scale * picture.width)
    screen = Image.new("RGB", (width, max(height, picture.height + 40)), "black")
    screen.paste(picture, (0, (screen.height - picture.height) // 2))
    draw = ImageDraw.Draw(screen)
    draw.text((6, 3), "12:34", "white", ImageFont.load_default(11))
    draw.rounded_rectangle((width - 26, 5, width - 6, 14), 2, outline="white")
    for x in (0.25, 0.5, 0.75):
        draw.ellipse((x * width - 4, screen.height - 14, x * width + 4, screen.height - 6), outline="white")
    return screen


def watermark(picture: Image.Image, opacity: float) -> Image.Image:
    """Write one word across the middle with some opacity."""
    marked = picture.copy()
    font = ImageFont.load_default(max(8, picture.width // 7))
    ImageDraw.Draw(marked).text((picture.width / 2, picture.height / 2), "sample", "white", font, anchor="mm")
    return Image.blend(picture, marked, opacity)


def sticker(picture: Image.Image, part: float) -> Image.Image:
    """Cover the middle with a yellow disc, its diameter a part of the shorter side."""
    covered = picture.copy()
    x, y, r = picture.width / 2, picture.height / 2, part * min(picture.size) / 2
    ImageDraw.Draw(covered).ellipse((x - r, y - r, x + r, y + r), "gold")
    return covered


def oversaturate(picture: Image.Image, saturation: float) -> Image.Image:
    """Oversaturate and sharpen."""
    return ImageEnhance.Color(picture).enhance(saturation).filter(ImageFilter.UnsharpMask(2, 200))


def noise(picture: Image.Image, sigma: float) -> Image.Image:
    """Add Gaussian noise with this standard deviation, on a scale of 255."""
    pixels = np.asarray(picture, np.float32)
    added = np.random.default_rng(SEED).normal(0, sigma, pixels.shape)
    return Image.fromarray((pixels + added).clip(0, 255).astype(np.uint8))


def blank_bar(picture: Image.Image, part: float) -> Image.Image:
    """Add an empty white bar above, a part of the height: the place of a caption without one."""
    return ImageOps.expand(picture, (0, round(part * picture.height), 0, 0), "white")


def blur_edges(picture: Image.Image, part: float) -> Image.Image:
    """Blur a part of the height at the top and at the bottom, where captions are, until nobody can read it."""
    blurred = picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 12))
    height = round(part * picture.height)
    whole = picture.copy()
    for top in (0, picture.height - height):
        whole.paste(blurred.crop((0, top, picture.width, top + height)), (0, top))
    return whole


CORRUPTIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], tuple[float, ...]]] = {
    "JPEG quality": (jpeg, (75, 50, 30, 15, 8)),
    "scaled down and up, factor": (shrink, (2, 3, 4)),
    "cropped, part": (crop, (0.05, 0.1, 0.2, 0.3)),
    "white border, part": (border, (0.05, 0.15, 0.3)),
    "black bars, part": (letterbox, (0.1, 0.25, 0.5)),
    "phone screenshot, height": (screenshot, (1.6, 2.1)),
    "empty bar above, part": (blank_bar, (0.15, 0.3)),
    "watermark, opacity": (watermark, (0.3, 0.6)),
    "sticker, part": (sticker, (0.2, 0.4)),
    "grey": (lambda picture, _: picture.convert("L").convert("RGB"), (1,)),
    "oversaturated, factor": (oversaturate, (2, 3)),
    "Gaussian noise, sigma": (noise, (8, 16, 32)),
    "Gaussian blur, pixels": (
        lambda picture, radius: picture.filter(ImageFilter.GaussianBlur(radius)),
        (1, 2, 3),
    ),
    "mirrored": (lambda picture, _: ImageOps.mirror(picture), (1,)),
    "rotated, degrees": (lambda picture, angle: picture.rotate(angle, expand=True), (90, 180)),
    "top and bottom blurred, part": (blur_edges, (0.15, 0.3)),
}


@dataclass(frozen=True, slots=True)
class Effect:
    """What one corruption does at one severity.

    Attributes:
        corruption: its name and the unit of the severity.
        severity: in that unit.
        accuracy: after the corruption.
        flip_rate: share of the pictures whose label changes.
        memes_lost: of the memes that are found when clean, the share that is missed now.
        others_turned: of the others that are right when clean, the share that is called a meme now.
        probability_shift: mean absolute change of the probability of meme.
    """

    corruption: str
    severity: float
    accuracy: Estimate
    flip_rate: Estimate
    memes_lost: Estimate
    others_turned: Estimate
    probability_shift: float


def balanced_sample(pictures: list[LabelledPicture], of_each_class: int) -> list[LabelledPicture]:
    """Draw equally many pictures of each class with a seed, fewer where there are not enough."""
    chosen = []
    for label in CLASSES:
        of_label = [picture for picture in pictures if picture.label == label]
        chosen += random.Random(SEED).sample(of_label, min(of_each_class, len(of_label)))
    return chosen


def predict_all(classifier: Classifier, pictures: list[Image.Image]) -> list[Prediction]:
    """Classify in batches."""
    starts = range(0, len(pictures), BATCH)
    return [prediction for start in starts for prediction in classifier.predict(pictures[start : start + BATCH])]


def measure(classifier: Classifier, pictures: list[Image.Image], truth: list[str]) -> list[Effect]:
    """Classify all pictures clean (the first effect) and after every corruption, each on one core."""
    clean = predict_all(classifier, pictures)

    def effect(setting: tuple[str, float]) -> Effect:
        name, severity = setting
        apply, _ = CORRUPTIONS[name]
        corrupted = predict_all(classifier, [apply(picture, severity) for picture in pictures])
        return measure_effect(name, severity, clean, corrupted, truth)

    settings = [(name, severity) for name, (_, severities) in CORRUPTIONS.items() for severity in severities]
    with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        effects = list(tqdm(pool.map(effect, settings), desc="Corrupting", total=len(settings), unit="setting"))
    return [measure_effect("none", 0, clean, clean, truth), *effects]


def measure_effect(
    name: str, severity: float, clean: list[Prediction], corrupted: list[Prediction], truth: list[str]
) -> Effect:
    """Compare the answers before and after one corruption."""
    before, after = (np.array([p.label == MEME for p in answers]) for answers in (clean, corrupted))
    is_meme = np.array([label == MEME for label in truth])
    shift = [abs(a.meme_probability - b.meme_probability) for a, b in zip(clean, corrupted, strict=True)]
    return Effect(
        name,
        severity,
        share(after == is_meme),
        flip_rate=share(before != after),
        memes_lost=share(~after[is_meme & before]),
        others_turned=share(after[~is_meme & ~before]),
        probability_shift=float(np.mean(shift)),
    )


def to_markdown(effects: list[Effect]) -> str:
    """The effects as a Markdown table."""
    lines = [
        "| corruption | severity | accuracy (95 % interval) | flipped | memes lost | others turned meme |",
        "|---|---|---|---|---|---|",
    ]
    for effect in effects:
        rates = (effect.flip_rate, effect.memes_lost, effect.others_turned)
        cells = [
            effect.corruption,
            f"{effect.severity:g}",
            f"{effect.accuracy.value:.1%} ({effect.accuracy.low:.1%} to {effect.accuracy.high:.1%})",
            *("–" if rate.value is None else f"{rate.value:.1%}" for rate in rates),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Read the command line, measure, print, write; 0 when all is done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.robustness", description="Measure how corruptions change the answers."
    )
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--of-each-class", type=int, metavar="N", default=300, help="pictures of each class")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    arguments = parser.parse_args()

    try:
        classifier = Classifier.load(arguments.checkpoint)
    except BadCheckpoint as error:
        parser.error(str(error))
    pictures: list[Image.Image] = []
    truth: list[str] = []
    for labelled, opened in open_batches(balanced_sample(read_folder(arguments.data), arguments.of_each_class)):
        for picture in opened:
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        pictures += opened
        truth += [picture.label for picture in labelled]
    if set(truth) != set(CLASSES):
        parser.error(f"there must be readable pictures below both {arguments.data}/meme and {arguments.data}/not_meme")

    effects = measure(classifier, pictures, truth)
    print(f"{truth.count(MEME)} memes and {truth.count(NOT_MEME)} others\n\n{to_markdown(effects)}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Any] = {
            "checkpoint_sha256": classifier.sha256,
            "n": {label: truth.count(label) for label in CLASSES},
            "effects": [asdict(effect) for effect in effects],
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
