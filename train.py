"""Train the classifier on a folder of pictures: python train.py DATA_DIR --out best_model.pth

DATA_DIR holds `meme/` and `not_meme/`; each of their sub-folders is one source, named `GROUP__SOURCE`
or in any other way. The run saves its state every two minutes and continues with --resume.
"""

import argparse
import hashlib
import math
import pickle
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from augment import Augment
from evaluate import LabelledPicture, read_folder
from gradcam import evidence, forward_with_feature_map
from images import BadImage, open_picture
from metrics import Array, share
from model import (
    CLASSES,
    DEFAULT_CHECKPOINT,
    MEME,
    Classifier,
    Preprocessing,
    build_network,
    save_checkpoint,
    save_whole,
)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of training at one resolution."""

    input_size: int  # pixels
    pictures: int


# Low resolution first: two pictures at 128 px cost as much as one at 192.
STAGES = (Stage(128, 100_000), Stage(192, 50_000))
BATCH = 64
LEARNING_RATE = 1e-3  # peak; a short warm-up, then half a cosine over all stages
WARM_UP = 0.04  # share of all steps
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1  # 2-8 % of the training labels are wrong
EMA_DECAY = 0.998  # the average over about the last 500 steps is what is saved
SAVE_EVERY = 120  # seconds
HELD_OUT = 0.1  # share of the pictures, where no validation folder is given
AIM_PRECISION = 0.9  # a family photo called a meme is the costlier error
AIM_WHEN_ANSWERED = 0.985  # outside the band of doubt
MOST_UNANSWERED = 0.1  # share of the pictures inside it
INPUT_SIZE = 160  # pixels, of the finished classifier; on validation pictures better than 176, 192, 224 and 256
SEED = 0


class TrainingStream(IterableDataset[tuple[Tensor, int]]):
    """An endless draw of augmented pictures: both classes equally often, then as `balanced_weights` says.

    A run that resumes at another step draws anew from there; the same step gives the same draw.
    """

    def __init__(self, pictures: list[LabelledPicture], preprocessing: Preprocessing, first_step: int) -> None:
        self.pictures = pictures
        self.preprocessing = preprocessing
        self.first_step = first_step

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        draw = random.Random(f"{SEED}-{self.first_step}-{worker.id if worker else 0}")
        augment = Augment(draw)
        weights = balanced_weights(self.pictures)
        while True:
            for chosen in draw.choices(self.pictures, weights, k=1024):
                try:
                    picture = open_picture(chosen.path)
                except BadImage as error:
                    tqdm.write(f"{chosen.path}: {error}", file=sys.stderr)
                    continue
                yield self.preprocessing(augment(picture)), CLASSES.index(chosen.label)


def balanced_weights(pictures: list[LabelledPicture]) -> list[float]:
    """Weights for drawing pictures: half of the draws for each class, roots of the sizes below that.

    A source of n pictures weighs √n, and a group the root of its sources' sum: else a few large
    uniform sources, and photos, which are easy and many, would crowd out the rest.
    """
    sources = Counter((p.label, p.group, p.source) for p in pictures)
    groups: dict[tuple[str, str], float] = defaultdict(float)
    labels: dict[str, float] = defaultdict(float)
    for (label, group, _), size in sources.items():
        groups[label, group] += math.sqrt(size)
    for (label, _), size_root in groups.items():
        labels[label] += math.sqrt(size_root)
    return [
        sources[p.label, p.group, p.source] ** -0.5 * groups[p.label, p.group] ** -0.5 / labels[p.label]
        for p in pictures
    ]


def train(pictures: list[LabelledPicture], init: Path | None, state: Path, *, resume: bool) -> nn.Module:
    """Run all stages, or what is left of them, and return the averaged network on the CPU.

    Args:
        pictures: what to train on.
        init: a state dict to start from.
        state: where the run keeps itself; read when resuming, written every `SAVE_EVERY` seconds.
        resume: go on from `state` if it is there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    network = build_network()
    if init:
        load_initial_weights(network, init)
    network = network.to(device).to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    parts: dict[str, Any] = {"network": network, "average": average, "optimizer": optimizer}
    run = {"data": fingerprint(pictures), "stages": [asdict(stage) for stage in STAGES]}
    step = 0
    if resume and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{state} is of a run on other pictures or with other stages; delete it to start anew.")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step = saved["step"]

    ends = np.cumsum([stage.pictures for stage in STAGES]) // BATCH
    saved_at = time.monotonic()
    bar = tqdm(total=int(ends[-1]), initial=step, unit="step", smoothing=0.05)
    for stage, end in zip(STAGES, ends, strict=True):
        stream = TrainingStream(pictures, Preprocessing(stage.input_size), step)
        workers = 1 if device.type == "cpu" else 8
        loader = DataLoader(stream, BATCH, num_workers=workers, prefetch_factor=4)
        batches: Iterator[list[Tensor]] = iter(loader) if step < end else iter(())
        while step < end:
            inputs, labels = next(batches)  # (BATCH, 3, S, S), (BATCH,)
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step / ends[-1])
            with torch.autocast(device.type, torch.bfloat16):
                logits = network(inputs.to(device, memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits.float(), labels.to(device), label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(network)
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", size=stage.input_size)
            if time.monotonic() - saved_at > SAVE_EVERY or step == end:
                save_whole({"run": run, "step": step} | {name: p.state_dict() for name, p in parts.items()}, state)
                saved_at = time.monotonic()
    trained: nn.Module = average.module.cpu().eval().requires_grad_(False)
    centre_classifier(trained)
    return trained


def centre_classifier(network: nn.Module) -> None:
    """Subtract from the last layer what both classes share; no probability changes.

    The softmax sees only the classes' difference. Afterwards each logit is evidence for its class
    against the other, and so is its heatmap.
    """
    for weights in network.get_submodule("classifier").parameters():
        weights.sub_(weights.mean(0, keepdim=True))


def schedule(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to zero."""
    if progress < WARM_UP:
        return progress / WARM_UP + 1e-3
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def load_initial_weights(network: nn.Module, path: Path) -> None:
    """Start from any DenseNet121 state dict; only its classifier may be missing or of another size."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = weights.get("state_dict", weights)
        weights = {name.removeprefix("module."): w.float() for name, w in weights.items() if "classifier" not in name}
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{path} cannot be read as DenseNet121's weights: {error}") from error
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise SystemExit(f"{path} does not hold DenseNet121's weights.")


def hold_out(pictures: list[LabelledPicture]) -> tuple[list[LabelledPicture], list[LabelledPicture]]:
    """Set whole sources aside, so that calibration sees unknown ones: at most twice `HELD_OUT` of each class.

    Where every source of a class is larger than that, single pictures of it are set aside.
    """
    aside: list[LabelledPicture] = []
    for label in CLASSES:
        of_label = [picture for picture in pictures if picture.label == label]
        sources = sorted({picture.source for picture in of_label})
        random.Random(SEED).shuffle(sources)
        taken: list[LabelledPicture] = []
        for source in sources:
            of_source = [picture for picture in of_label if picture.source == source]
            if len(taken) < HELD_OUT * len(of_label) and len(taken + of_source) <= 2 * HELD_OUT * len(of_label):
                taken += of_source
        aside += taken or random.Random(SEED).sample(of_label, math.ceil(HELD_OUT * len(of_label)))
    chosen = {picture.path for picture in aside}
    return [picture for picture in pictures if picture.path not in chosen], aside


def open_batches(pictures: list[LabelledPicture]) -> Iterator[tuple[list[LabelledPicture], list[Image.Image]]]:
    """Open labelled pictures batch by batch, naming on stderr those that cannot be opened."""
    for start in tqdm(range(0, len(pictures), BATCH), desc="Calibrating", unit="batch"):
        labelled, opened = [], []
        for picture in pictures[start : start + BATCH]:
            try:
                opened.append(open_picture(picture.path))
                labelled.append(picture)
            except BadImage as error:
                tqdm.write(f"{picture.path}: {error}", file=sys.stderr)
        if opened:
            yield labelled, opened


@dataclass(frozen=True, slots=True)
class Calibration:
    """What validation pictures teach beyond the weights; see `model.Classifier` for the meaning."""

    temperature: float
    threshold: float
    not_sure: tuple[float, float]
    evidence_scale: float


def calibrate(
    network: nn.Module, preprocessing: Preprocessing, pictures: list[LabelledPicture]
) -> tuple[Calibration, Array, Array]:
    """Fit the calibration; also return the probabilities of meme and the truth, both of shape (N,)."""
    margins, strongest, truth = [], [], []
    for labelled, opened in open_batches(pictures):
        inputs = torch.stack([preprocessing(picture) for picture in opened])
        logits, feature_map = forward_with_feature_map(network, inputs)
        maps = torch.stack([evidence(logits, feature_map, index) for index in range(len(CLASSES))], 1)  # (N, 2, h, w)
        ours = CLASSES.index(MEME)
        margins += (logits[:, ours] - logits[:, 1 - ours]).tolist()
        strongest += maps.amax((1, 2, 3)).tolist()
        truth += [picture.label == MEME for picture in labelled]
    is_meme, margin = np.array(truth), np.array(margins)
    temperature = fit_temperature(margin, is_meme)
    probability = 1 / (1 + np.exp(-margin / temperature))
    threshold = fit_threshold(probability, is_meme)
    not_sure = fit_not_sure(probability, is_meme, threshold)
    # Half of all pictures have a place that is painted in full red.
    return Calibration(temperature, threshold, not_sure, float(np.median(strongest))), probability, is_meme


def fit_temperature(margin: Array, is_meme: Array) -> float:
    """The temperature of least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599)."""
    towards_truth = np.where(is_meme, margin, -margin)
    temperatures = np.geomspace(0.1, 10, 1001)
    return float(min(temperatures, key=lambda t: np.logaddexp(0, -towards_truth / t).mean()))


def fit_threshold(probability: Array, is_meme: Array) -> float:
    """The lowest threshold at which `AIM_PRECISION` of those called memes are memes, else the most precise one."""
    thresholds = np.linspace(0.05, 0.95, 181)
    called = [is_meme[probability >= threshold] for threshold in thresholds]
    precision = np.array([memes.mean() if len(memes) else 0 for memes in called])
    reached = precision >= AIM_PRECISION
    return float(thresholds[reached.argmax() if reached.any() else precision.argmax()])


def fit_not_sure(probability: Array, is_meme: Array, threshold: float) -> tuple[float, float]:
    """The narrowest band around the threshold outside of which answers are right as often as is aimed at.

    It never leaves more than `MOST_UNANSWERED` of the pictures without an answer.
    """
    right = (probability >= threshold) == is_meme
    centre = math.log(threshold / (1 - threshold))
    low = high = threshold
    for half in np.linspace(0, 4, 81):
        low_ = min(threshold, 1 / (1 + math.exp(half - centre)))
        high_ = max(threshold, 1 / (1 + math.exp(-half - centre)))
        answered = (probability <= low_) | (probability >= high_)
        if answered.mean() < 1 - MOST_UNANSWERED:
            break
        low, high = low_, high_
        if right[answered].mean() >= AIM_WHEN_ANSWERED:
            break
    return low, high


def fingerprint(pictures: list[LabelledPicture]) -> str:
    """SHA-256 over the labels, names and sizes of the files, wherever their folder lies."""
    lines = sorted(f"{p.label}/{p.path.parent.name}/{p.path.name} {p.path.stat().st_size}" for p in pictures)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def main() -> int:
    """Read the command line, train, calibrate, write; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Train the classifier on a folder of pictures.")
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--out", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--init", type=Path, metavar="WEIGHTS", help="DenseNet121 weights to start from")
    parser.add_argument("--val", type=Path, metavar="DIR", help="pictures to calibrate on, else some sources of data")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    arguments = parser.parse_args()

    pictures = read_folder(arguments.data)
    held_out = read_folder(arguments.val) if arguments.val else pictures
    for folder, found in ((arguments.data, pictures), (arguments.val, held_out)):
        if {picture.label for picture in found} != set(CLASSES):
            parser.error(f"there must be pictures below both {folder}/meme and {folder}/not_meme")
    if not arguments.val:
        pictures, held_out = hold_out(pictures)

    state = arguments.out.with_suffix(".resume.pth")
    network = train(pictures, arguments.init, state, resume=arguments.resume)
    preprocessing = Preprocessing(INPUT_SIZE)
    calibration, probability, is_meme = calibrate(network, preprocessing, held_out)
    accuracy = share((probability >= calibration.threshold) == is_meme)
    save_checkpoint(
        arguments.out,
        network,
        preprocessing,
        **asdict(calibration),
        about={
            "created": datetime.now(UTC).date().isoformat(),
            "trained_on": dict(Counter(picture.label for picture in pictures)),
            "data_sha256": fingerprint(pictures),
            "stages": [asdict(stage) for stage in STAGES],
            "validation_accuracy": asdict(accuracy),
        },
    )
    print(f"{arguments.out}: {accuracy.value:.1%} of {len(is_meme)} validation pictures right")
    print(f"SHA-256 {Classifier.load(arguments.out).sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
