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
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from augment import Augment
from calibrate import calibrate, open_batches
from evaluate import LabelledPicture, read_folder
from images import BadImage, open_picture
from metrics import auroc, share
from model import (
    CLASSES,
    DEFAULT_CHECKPOINT,
    MEME,
    Classifier,
    Preprocessing,
    build_network,
    for_inference,
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
VALIDATE_EVERY = 400  # steps
HELD_OUT = 0.1  # share of the pictures, where no validation folder is given
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


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stood; the loss is the mean since the one before, the rest is of the averaged network."""

    pictures: int  # drawn so far
    input_size: int  # pixels
    loss: float
    validation_accuracy: float  # at the threshold of even odds
    validation_auroc: float


def train(
    pictures: list[LabelledPicture], held_out: list[LabelledPicture], init: str | None, state: Path, *, resume: bool
) -> tuple[nn.Module, list[Progress]]:
    """Run all stages, or what is left of them; return the averaged network on the CPU, and its history.

    Args:
        pictures: what to train on.
        held_out: what to validate on.
        init: what `load_initial_weights` takes.
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
    run = {
        "data": fingerprint(pictures),
        "held_out": fingerprint(held_out),
        "stages": [asdict(stage) for stage in STAGES],
    }
    step, history, losses = 0, list[Progress](), list[float]()
    if resume and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{state} is of a run on other pictures or with other stages; delete it to start anew.")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step = saved["step"]
        history, losses = [Progress(**entry) for entry in saved["history"]], saved["losses"]

    ends = [total // BATCH for total in accumulate(stage.pictures for stage in STAGES)]
    saved_at = time.monotonic()
    bar = tqdm(total=ends[-1], initial=step, unit="step", smoothing=0.05)
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
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", size=stage.input_size)
            if step % VALIDATE_EVERY == 0 or step == end:
                accuracy, area = validate(average.module, Preprocessing(stage.input_size), held_out, device)
                history.append(Progress(step * BATCH, stage.input_size, float(np.mean(losses)), accuracy, area))
                losses = []
            if time.monotonic() - saved_at > SAVE_EVERY or step == end:
                written = {"run": run, "step": step, "history": [asdict(entry) for entry in history], "losses": losses}
                save_whole(written | {name: part.state_dict() for name, part in parts.items()}, state)
                saved_at = time.monotonic()
    trained: nn.Module = average.module.cpu().eval().requires_grad_(False)
    centre_classifier(trained)
    return trained, history


def validate(
    network: nn.Module, preprocessing: Preprocessing, pictures: list[LabelledPicture], device: torch.device
) -> tuple[float, float]:
    """Accuracy at even odds and AUROC on held-out pictures."""
    margins: list[float] = []
    truth: list[bool] = []
    network.eval()
    for labelled, opened in open_batches(pictures):
        inputs = torch.stack([preprocessing(picture) for picture in opened]).to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            logits = network(inputs.to(memory_format=torch.channels_last)).float()
        ours = CLASSES.index(MEME)
        margins += (logits[:, ours] - logits[:, 1 - ours]).tolist()
        truth += [picture.label == MEME for picture in labelled]
    is_meme, margin = np.array(truth), np.array(margins)
    return float(((margin > 0) == is_meme).mean()), auroc(is_meme, margin)


def draw_history(path: Path, history: list[Progress]) -> None:
    """Draw the training's loss and the validation's accuracy and AUROC over the pictures drawn."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = [entry.pictures for entry in history]
    left.plot(drawn, [entry.loss for entry in history], marker=".")
    left.set(title="Training loss", xlabel="pictures drawn", ylabel="cross-entropy, smoothed labels")
    right.plot(drawn, [entry.validation_accuracy for entry in history], marker=".", label="accuracy")
    right.plot(drawn, [entry.validation_auroc for entry in history], marker=".", label="AUROC")
    right.set(title="Validation", xlabel="pictures drawn")
    right.legend()
    for before, after in pairwise(history):
        if before.input_size != after.input_size:
            for ax in (left, right):
                ax.axvline(before.pictures, color="grey", linewidth=1, linestyle="--")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


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


def load_initial_weights(network: nn.Module, init: str) -> None:
    """Start from `imagenet`, torchvision's own weights (downloaded), or from a file with a DenseNet121's.

    Of a file's state dict only the classifier may be missing or of another size.
    """
    try:
        if init == "imagenet":
            weights = torchvision.models.densenet121(weights="DEFAULT").state_dict()
        else:
            weights = torch.load(init, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
        weights = {name.removeprefix("module."): w.float() for name, w in weights.items() if "classifier" not in name}
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except (OSError, EOFError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{init} cannot be read as DenseNet121's weights: {error}") from error
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise SystemExit(f"{init} does not hold DenseNet121's weights.")


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


def of_unknown_sources(held_out: list[LabelledPicture], pictures: list[LabelledPicture]) -> list[LabelledPicture]:
    """The held-out pictures of sources that training did not know; of a class that has none, all.

    Pictures of known sources are easier. Calibrated on them, the network would be too sure elsewhere.
    """
    known = {(picture.label, picture.source) for picture in pictures}
    chosen = []
    for label in CLASSES:
        of_label = [picture for picture in held_out if picture.label == label]
        chosen += [picture for picture in of_label if (label, picture.source) not in known] or of_label
    return chosen


def fingerprint(pictures: list[LabelledPicture]) -> str:
    """SHA-256 over the labels, names and sizes of the files, wherever their folder lies."""
    lines = sorted(f"{p.label}/{p.path.parent.name}/{p.path.name} {p.path.stat().st_size}" for p in pictures)
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def main() -> int:
    """Read the command line, train, calibrate, write; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Train the classifier on a folder of pictures.")
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--out", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--init", metavar="WEIGHTS", help="file to start from, or imagenet for torchvision's weights")
    parser.add_argument(
        "--val", type=Path, metavar="DIR", help="pictures to validate and calibrate on, else some of data"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("outputs/training.png"))
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
    network, history = train(pictures, held_out, arguments.init, state, resume=arguments.resume)
    draw_history(arguments.plot, history)
    preprocessing = Preprocessing(INPUT_SIZE)
    unknown = of_unknown_sources(held_out, pictures)
    calibration, probability, is_meme = calibrate(for_inference(network), preprocessing, unknown)
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
            "history": [asdict(entry) for entry in history],
            "validation_accuracy": asdict(accuracy),
        },
    )
    print(f"{arguments.out}: {accuracy.value:.1%} of {len(is_meme)} validation pictures right")
    print(f"SHA-256 {Classifier.load(arguments.out).sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
