"""Train the classifier on folders of pictures: python -m training.train DATA_DIR... --out best_model.pth

DATA_DIR holds `meme/` and `not_meme/`; each of their sub-folders is one source, named `GROUP__SOURCE`
or in any other way. First a teacher that knows ImageNet is fine-tuned on the pictures, then DenseNet121
learns from the labels, from that teacher's answers and features, and from the network that it starts from if
that is a classifier already: half of the time on pictures for which there is no label. Of drawn memes it learns
besides where their captions are. The run saves its state every two minutes and continues with --resume.
"""

import argparse
import hashlib
import math
import os
import pickle
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
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

from borders import content_box
from engine import OPENVINO, best_engine, compile_network
from evaluation.dataset import LabelledPicture, open_batches, read_folder
from evaluation.metrics import auroc, share
from images import BadImage, find_pictures, open_picture
from model import (
    CLASSES,
    DEFAULT_CHECKPOINT,
    MEME,
    BadCheckpoint,
    Classifier,
    Preprocessing,
    build_network,
    fastest_dtype,
    for_inference,
    save_atomically,
    save_checkpoint,
)
from training.augment import Augment, mix
from training.calibrate import calibrate, shifted
from training.synthesize import Box, read_captions
from training.teacher import INPUT_SIZE as TEACHER_INPUT_SIZE
from training.teacher import DistillationStudent, Teacher


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How one of the two networks is trained.

    Attributes:
        input_size: in pixels.
        pictures: how many to draw.
        learning_rate: at its peak, see `schedule`.
        ema_decay: of the running average of the weights, which is what is kept.
        fall: share of all steps in which the rate falls to zero.
    """

    input_size: int
    pictures: int
    learning_rate: float
    ema_decay: float
    fall: float


TEACHER = TrainingConfig(TEACHER_INPUT_SIZE, 19_200, 3e-4, 0.99, 0.3)  # longer, it gets worse on new sources
TEACHERS = 2  # runs, whose weights are average_weights
STUDENT = TrainingConfig(160, 76_800, 1e-3, 0.998, 0)
BATCH = 64
WARM_UP = 0.04  # share of all steps
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1  # 2-5 % of the memes' labels are wrong
LABEL_WEIGHT = 0.6  # beside the teachers' answers
GROUP_WEIGHT = 0.5  # of naming the group (poster, photo, ...) beside the class
FEATURE_WEIGHT = 1.5  # of the teacher's feature map
PLACE_WEIGHT = 1.0  # of finding the captions, for each picture where they are known
NO_LABEL = -100  # what cross_entropy leaves out
UNKNOWN = [NO_LABEL, NO_LABEL, 0]  # class, group, and whether they are certain
UNLABELLED = 0.15  # share of the pictures without a label in the half that is learnt without one
CAPTIONED = 0.15  # share of drawn memes whose captions' places are known among the pictures with a label
SAVE_EVERY = 120  # seconds
VALIDATE_EVERY = 100  # steps
HELD_OUT = 0.1  # share of the pictures, where no validation folder is given
INPUT_SIZE = 160  # pixels, of the finished classifier; on validation pictures better than 176, 192, 224 and 256
SEED = 0


class TrainingStream(IterableDataset[tuple[dict[int, Tensor], Tensor, Tensor]]):
    """An endless draw of augmented pictures: both classes equally often, then as `balanced_weights` says.

    Where captions are known, `CAPTIONED` of those with a label are such a meme instead, so 57 % are memes.
    Each comes as inputs of all the sizes asked for; with the indices of its class and its group and with 1 if its
    label is certain, shape (3,); and with the places of its captions as `cells` gives them, all 0 where they are not
    known. A run that resumes at another step draws anew from there; the same step gives the same draw.

    Args:
        pictures: what to draw from.
        sizes: pixels.
        first_step: of the run.
        unlabelled: if given, every second picture is any part of one, or of one of these, and `NO_LABEL`.
        certain: pictures whose labels no teacher knows better.
        captions: of memes among the pictures, each a box or more.
        seed: of the draw.
    """

    def __init__(
        self,
        pictures: list[LabelledPicture],
        sizes: set[int],
        first_step: int,
        *,
        unlabelled: list[Path] | None = None,
        certain: Collection[Path] = (),
        captions: dict[Path, list[Box]] | None = None,
        seed: int = SEED,
    ) -> None:
        self.pictures = pictures
        self.certain = frozenset(certain)
        self.captions = captions or {}
        self.groups = groups_of(pictures)
        self.preprocessings = {size: Preprocessing(size) for size in sizes}
        self.first_step = first_step
        self.unlabelled = unlabelled
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[dict[int, Tensor], Tensor, Tensor]]:
        worker = get_worker_info()
        draw = random.Random(f"{self.seed}-{self.first_step}-{worker.id if worker else 0}")
        augment = Augment(draw)
        weights = balanced_weights(self.pictures)
        captioned = [picture for picture in self.pictures if picture.path in self.captions]
        while True:
            for number, chosen in enumerate(draw.choices(self.pictures, weights, k=1024)):
                labelled = self.unlabelled is None or number % 2 == 0
                placed = bool(labelled and captioned and draw.random() < CAPTIONED)
                drawn = draw.choice(captioned) if placed else chosen
                path = drawn.path
                if not labelled and self.unlabelled and draw.random() < UNLABELLED:
                    path = draw.choice(self.unlabelled)
                try:
                    picture = open_picture(path)
                except BadImage as error:
                    tqdm.write(f"{path}: {error}", file=sys.stderr)
                    continue
                if placed:
                    picture = augment.in_place(picture)
                else:
                    picture = augment(picture) if labelled else augment.anything(picture)
                truth = [CLASSES.index(drawn.label), self.groups.index(drawn.group), path in self.certain]
                inputs = {size: preprocess(picture) for size, preprocess in self.preprocessings.items()}
                # The network does not see a frame, so its captions are elsewhere.
                known = placed and content_box(picture) is None
                yield inputs, torch.tensor(truth if labelled else UNKNOWN), cells(self.captions[path] if known else [])


def cells(boxes: list[Box]) -> Tensor:
    """1 for the cells of DenseNet121's last map, at `INPUT_SIZE`, that captions cover at least half as much as any."""
    fine = 16  # points along each side of a cell
    side = INPUT_SIZE // 32
    covered = torch.zeros(side * fine, side * fine)
    for left, top, right, bottom in boxes:
        rows = slice(round(top * side * fine), round(bottom * side * fine))
        covered[rows, round(left * side * fine) : round(right * side * fine)] = 1
    shares = covered.view(side, fine, side, fine).mean((1, 3))
    return ((shares > 0) & (shares >= shares.max() / 2)).float()


def groups_of(pictures: list[LabelledPicture]) -> list[str]:
    """The names of the groups, in the order of the outputs that follow those of the classes."""
    return sorted({picture.group for picture in pictures})


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
    loss: float
    validation_accuracy: float  # at the threshold of even odds
    validation_auroc: float


def train(
    network: nn.Module,
    course: TrainingConfig,
    pictures: list[LabelledPicture],
    held_out: list[LabelledPicture],
    state: Path,
    *,
    resume: bool,
    teachers: Sequence[tuple[nn.Module, int]] = (),
    unlabelled: list[Path] | None = None,
    certain: Collection[Path] = (),
    captions: dict[Path, list[Box]] | None = None,
    seed: int = SEED,
) -> tuple[nn.Module, list[Progress]]:
    """Run a course, or what is left of it; return the averaged network, and its history.

    Args:
        network: (N, 3, S, S) -> logits of the classes and the groups, and a feature map; trained in place.
        course: how.
        pictures: what to train on.
        held_out: what to validate on.
        state: where the run keeps itself; read when resuming, written every `SAVE_EVERY` seconds.
        resume: go on from `state` if it is there.
        teachers: what `teacher_outputs` takes; they see the very same crops, `network` is then a `DistillationStudent`.
        unlabelled: like the two that follow, what `TrainingStream` takes.
        certain: the same.
        captions: the same.
        seed: of the draw.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(course.ema_decay), use_buffers=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, course.learning_rate, weight_decay=WEIGHT_DECAY)
    parts: dict[str, Any] = {"network": network, "average": average, "optimizer": optimizer}
    run = {
        "data": fingerprint(pictures),
        "held_out": fingerprint(held_out),
        "course": asdict(course),
        "teachers": [
            digest(weights.cpu().contiguous().numpy().tobytes() for weights in teacher.state_dict().values())
            for teacher, _ in teachers
        ],
        "others": [digest(sorted(map(name_and_size, paths))) for paths in (unlabelled or (), certain)],
        "captions": digest(sorted(f"{path.name} {boxes}".encode() for path, boxes in (captions or {}).items())),
        "seed": seed,
    }
    step, history, losses = 0, list[Progress](), list[float]()
    if resume and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(f"{state} is of a run on other pictures, steps or teachers; delete it to start anew.")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step = saved["step"]
        history, losses = [Progress(**entry) for entry in saved["history"]], saved["losses"]

    steps = course.pictures // BATCH
    sizes = {course.input_size, *(size for _, size in teachers)}
    stream = TrainingStream(pictures, sizes, step, unlabelled=unlabelled, certain=certain, captions=captions, seed=seed)
    workers = 1 if device.type == "cpu" else 8
    loader = DataLoader(stream, BATCH, num_workers=workers, prefetch_factor=4)
    batches: Iterator[tuple[dict[int, Tensor], Tensor, Tensor]] = iter(loader) if step < steps else iter(())
    saved_at = time.monotonic()
    bar = tqdm(total=steps, initial=step, unit="step", smoothing=0.05)
    while step < steps:
        inputs, truth, places = next(batches)  # {S: (BATCH, 3, S, S)}, (BATCH, 3), (BATCH, h, w)
        free = (truth[:, 0] == NO_LABEL).nonzero()[:, 0].tolist()
        for group in optimizer.param_groups:
            group["lr"] = course.learning_rate * schedule(step / steps, course.fall)
        network.train()
        mixed = mix(inputs, free, random.Random(f"{seed}-{step}"))
        loss = training_step(
            network, course.input_size, teachers, mixed, truth=truth.to(device), places=places.to(device)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        step += 1
        bar.update()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if step % VALIDATE_EVERY == 0 or step == steps:
            accuracy, area = validate(average.module, Preprocessing(course.input_size), held_out, device)
            history.append(Progress(step * BATCH, float(np.mean(losses)), accuracy, area))
            losses = []
        if time.monotonic() - saved_at > SAVE_EVERY or step == steps:
            written = {"run": run, "step": step, "history": [asdict(entry) for entry in history], "losses": losses}
            save_atomically(written | {name: part.state_dict() for name, part in parts.items()}, state)
            saved_at = time.monotonic()
    finished: nn.Module = average.module.eval().requires_grad_(False)
    return finished, history


def training_step(
    network: nn.Module,
    input_size: int,
    teachers: Sequence[tuple[nn.Module, int]],
    inputs: dict[int, Tensor],
    *,
    truth: Tensor,
    places: Tensor,
) -> Tensor:
    """The loss of one batch.

    Args:
        network: see `train`.
        input_size: its own, in pixels.
        teachers: what `teacher_outputs` takes.
        inputs: the network's and its teachers', of shape (N, 3, S, S), by S.
        truth: what `distillation_loss` takes.
        places: what `caption_loss` takes.
    """
    device = truth.device
    taught, taught_map = teacher_outputs(teachers, inputs, device) if teachers else (None, None)
    with fastest_autocast(device):
        logits, feature_map, *by_cell = network(inputs[input_size].to(device, memory_format=torch.channels_last))
    loss = distillation_loss(logits.float(), truth, taught)
    if isinstance(network, DistillationStudent) and taught_map is not None:
        loss = loss + FEATURE_WEIGHT * network.distance(feature_map.float(), taught_map)
        loss = loss + PLACE_WEIGHT * caption_loss(by_cell[0].float(), places)
    return loss


def fastest_autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 on a GPU, and on processors that multiply it in hardware; others take several times as long with it."""
    enabled = device.type != "cpu" or fastest_dtype() == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def caption_loss(by_cell: Tensor, places: Tensor) -> Tensor:
    """How far the strongest evidence for a meme is from the captions, as a mean over a batch.

    The cross-entropy between a softmax over all cells and "in one of those that a caption covers".

    Args:
        by_cell: each cell's logits, shape (N, outputs, h, w).
        places: which cells captions cover, shape (N, h, w); a picture with none does not count.
    """
    ours = CLASSES.index(MEME)
    chances = (by_cell[:, ours] - by_cell[:, 1 - ours]).flatten(1).log_softmax(1)
    inside = chances.masked_fill(places.flatten(1) == 0, -math.inf)
    known = places.flatten(1).any(1)
    return -inside[known].logsumexp(1).sum() / len(places)


def teacher_outputs(
    teachers: Sequence[tuple[nn.Module, int]], inputs: dict[int, Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the teachers say together: the mean of their logits of the classes, the first one's of the groups, its map.

    Args:
        teachers: networks with their input sizes; the first is a `Teacher`, the others give logits only.
        inputs: of shape (N, 3, S, S), by S.
        device: where the answers are to be.
    """
    (teacher, teachers_size), *others = teachers
    with torch.no_grad(), fastest_autocast(device):
        logits, feature_map = teacher(inputs[teachers_size].to(device))
        answers = [logits, *(network(inputs[size].to(device)) for network, size in others)]
    classes = torch.stack([answer[:, : len(CLASSES)].float() for answer in answers]).mean(0)
    return torch.cat([classes, logits[:, len(CLASSES) :].float()], 1), feature_map.float()


def distillation_loss(logits: Tensor, truth: Tensor, taught: Tensor | None) -> Tensor:
    """How far the network is from the labels and from its teachers' answers, of the classes and of the groups.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, without a temperature;
    on any pictures, mixed ones too, as Beyer et al. 2022, arXiv 2106.05237.

    Args:
        logits: of the classes, then of the groups, shape (N, C + G).
        truth: the indices of class and group, or `NO_LABEL`, and 1 where only they count, shape (N, 3).
        taught: the teachers' logits of the same pictures, if there are any.
    """
    sizes = [len(CLASSES), logits.shape[1] - len(CLASSES)]
    total = logits.new_zeros(())
    for part, weight in enumerate((1, GROUP_WEIGHT)):
        said = logits.split(sizes, 1)[part]
        loss = nn.functional.cross_entropy(
            said, truth[:, part], ignore_index=NO_LABEL, label_smoothing=LABEL_SMOOTHING, reduction="none"
        )
        if taught is not None:
            soft = taught.split(sizes, 1)[part].softmax(1)
            both = LABEL_WEIGHT * loss + nn.functional.cross_entropy(said, soft, reduction="none")
            loss = torch.where(truth[:, 2] == 1, loss, both)
        total = total + weight * loss.mean()
    return total


def validate(
    network: nn.Module, preprocessing: Preprocessing, pictures: list[LabelledPicture], device: torch.device
) -> tuple[float, float]:
    """Accuracy at even odds and AUROC on held-out pictures."""
    margins: list[float] = []
    truth: list[bool] = []
    network.eval()
    for labelled, opened in open_batches(pictures):
        inputs = torch.stack([preprocessing(picture) for picture in opened]).to(device)
        with torch.inference_mode(), fastest_autocast(device):
            logits = network(inputs.to(memory_format=torch.channels_last))[0].float()
        ours = CLASSES.index(MEME)
        margins += (logits[:, ours] - logits[:, 1 - ours]).tolist()
        truth += [picture.label == MEME for picture in labelled]
    is_meme, margin = np.array(truth), np.array(margins)
    return float(((margin > 0) == is_meme).mean()), auroc(is_meme, margin)


def average_weights(networks: Sequence[nn.Module]) -> nn.Module:
    """The first of some networks of one kind, with the mean of all their weights.

    Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
    """
    states = [network.state_dict() for network in networks]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    networks[0].load_state_dict({name: mean[name].to(tensor.dtype) for name, tensor in states[0].items()})
    return networks[0]


def plot_history(path: Path, histories: dict[str, list[Progress]]) -> None:
    """Draw each network's loss in training and its accuracy and AUROC in validation over the pictures drawn."""
    figure = Figure(figsize=(11, 4 * len(histories)), layout="constrained")
    rows = figure.subplots(len(histories), 2, squeeze=False)
    for (left, right), (name, history) in zip(rows, histories.items(), strict=True):
        drawn = [entry.pictures for entry in history]
        left.plot(drawn, [entry.loss for entry in history], marker=".")
        left.set(title=f"Training loss of the {name}", xlabel="pictures drawn", ylabel="cross-entropies, as weighted")
        right.plot(drawn, [entry.validation_accuracy for entry in history], marker=".", label="accuracy")
        right.plot(drawn, [entry.validation_auroc for entry in history], marker=".", label="AUROC")
        right.set(title=f"Validation of the {name}", xlabel="pictures drawn")
        right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def drop_group_outputs(network: nn.Module) -> nn.Module:
    """The same DenseNet121 with the classes' outputs only, on the CPU."""
    state = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    kept = {name: tensor[: len(CLASSES)] for name, tensor in state.items() if name.startswith("classifier.")}
    smaller = build_network()
    smaller.load_state_dict(state | kept)
    return smaller.eval().requires_grad_(False)


def centre_classifier(network: nn.Module) -> None:
    """Subtract from the last layer what both classes share; no probability changes.

    The softmax sees only the classes' difference. Afterwards each logit is evidence for its class
    against the other, and so is its heatmap.
    """
    for weights in network.get_submodule("classifier").parameters():
        weights.sub_(weights.mean(0, keepdim=True))


def schedule(progress: float, fall: float) -> float:
    """Share of the peak learning rate: linear warm-up, a plain, and at the end half a cosine down to zero.

    A rate that falls for long fits the training sources better and new ones worse.
    """
    if progress < WARM_UP:
        return progress / WARM_UP + 1e-3
    return 0.5 * (1 + math.cos(math.pi * (progress - 1 + fall) / fall)) if progress > 1 - fall else 1


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


def finetune_teachers(
    outputs: int, pictures: list[LabelledPicture], held_out: list[LabelledPicture], out: Path, *, resume: bool
) -> tuple[tuple[nn.Module, int], dict[str, list[Progress]]]:
    """The mean of some fine-tuned teachers, with its input size; and their histories."""
    tuned, histories = [], {}
    for seed in range(TEACHERS):
        torch.manual_seed(seed)
        state = out.with_suffix(f".teacher-{seed}.pth")
        network, history = train(Teacher(outputs), TEACHER, pictures, held_out, state, resume=resume, seed=seed)
        tuned.append(network)
        histories[f"teacher {seed + 1}"] = history
    return (for_teaching(average_weights(tuned), TEACHER_INPUT_SIZE), TEACHER_INPUT_SIZE), histories


def build_student(outputs: int, init: str | None) -> tuple[DistillationStudent, list[tuple[nn.Module, int]]]:
    """The network to train; and the classifier that it starts from, if it does, with its input size, to teach it."""
    torch.manual_seed(SEED)
    imitator = DistillationStudent(outputs)
    if not init:
        return imitator, []
    load_initial_weights(imitator.network, init)
    try:
        earlier = Classifier.load(init, torch.float32)
    except BadCheckpoint:
        return imitator, []
    with torch.no_grad():
        for name, weights in imitator.network.get_submodule("classifier").named_parameters():
            weights[: len(CLASSES)] = earlier.network.get_parameter(f"classifier.{name}")
    size = earlier.preprocessing.input_size
    return imitator, [(for_teaching(earlier.network, size), size)]


def for_teaching(network: nn.Module, input_size: int) -> nn.Module:
    """The network where it answers fastest: on the GPU, else compiled if that can be done."""
    if torch.cuda.is_available():
        return network.cuda()
    return compile_network(network, input_size) if best_engine() == OPENVINO else network


def hold_out(pictures: list[LabelledPicture]) -> tuple[list[LabelledPicture], list[LabelledPicture]]:
    """Set whole sources aside, so that calibration sees unknown ones: at most twice `HELD_OUT` of each class.

    The last source of a group stays.
    Where every source of a class is larger than that, single pictures of it are set aside.
    """
    aside: list[LabelledPicture] = []
    for label in CLASSES:
        of_label = [picture for picture in pictures if picture.label == label]
        sources = sorted({picture.source for picture in of_label})
        random.Random(SEED).shuffle(sources)
        taken: list[LabelledPicture] = []
        left = Counter(picture.group for picture in of_label)
        for source in sources:
            of_source = [picture for picture in of_label if picture.source == source]
            groups = Counter(picture.group for picture in of_source)
            if any(left[group] == count for group, count in groups.items()):
                continue  # training would not see such pictures at all
            if len(taken) < HELD_OUT * len(of_label) and len(taken + of_source) <= 2 * HELD_OUT * len(of_label):
                taken += of_source
                left -= groups
        aside += taken or random.Random(SEED).sample(of_label, math.ceil(HELD_OUT * len(of_label)))
    chosen = {picture.path for picture in aside}
    return [picture for picture in pictures if picture.path not in chosen], aside


def unseen_sources(held_out: list[LabelledPicture], pictures: list[LabelledPicture]) -> list[LabelledPicture]:
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
    return digest(sorted(p.label.encode() + b"/" + name_and_size(p.path) for p in pictures))


def name_and_size(path: Path) -> bytes:
    """What stays of a file when its folder moves."""
    return os.fsencode(f"{path.parent.name}/{path.name} {path.stat().st_size}")


def digest(lines: Iterable[bytes]) -> str:
    """SHA-256 of some lines."""
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


def main() -> int:
    """Read the command line, train, calibrate, write; 0 when done, 1 if files do not fit, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Train the classifier on folders of pictures.")
    parser.add_argument("data", type=Path, nargs="+", metavar="DATA_DIR", help="folder with meme/ and not_meme/")
    parser.add_argument("--out", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--init", metavar="WEIGHTS", help="file to start from, or imagenet for torchvision's weights")
    parser.add_argument(
        "--val", type=Path, metavar="DIR", help="pictures to validate and calibrate on, else some of data"
    )
    parser.add_argument(
        "--drawn", type=Path, nargs="+", metavar="DIR", default=[], help="more of the same, for DenseNet121 alone"
    )
    parser.add_argument(
        "--unlabelled", type=Path, nargs="+", metavar="DIR", default=[], help="any pictures, for the teachers to judge"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", default=Path("outputs/training.png"))
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    arguments = parser.parse_args()

    pictures = [picture for folder in arguments.data for picture in read_folder(folder)]
    held_out = read_folder(arguments.val) if arguments.val else pictures
    for folder, found in ((arguments.data[0], pictures), (arguments.val, held_out)):
        if {picture.label for picture in found} != set(CLASSES):
            parser.error(f"there must be pictures below both {folder}/meme and {folder}/not_meme")
    if not arguments.val:
        pictures, held_out = hold_out(pictures)

    outputs = len(CLASSES) + len(groups_of(pictures))
    more = [picture for folder in arguments.drawn for picture in read_folder(folder)]
    if strange := set(groups_of(more)) - set(groups_of(pictures)):
        parser.error(f"there are no pictures of the groups {', '.join(sorted(strange))} in {arguments.data[0]}")
    unlabelled = [path for folder in arguments.unlabelled for path in find_pictures(folder)]
    resume = arguments.resume
    teacher, histories = finetune_teachers(outputs, pictures, held_out, arguments.out, resume=resume)
    imitator, earlier = build_student(outputs, arguments.init)
    teachers = [teacher, *earlier]
    state = arguments.out.with_suffix(".resume.pth")
    average, histories["DenseNet121"] = train(
        imitator,
        STUDENT,
        pictures + more,
        held_out,
        state,
        resume=resume,
        teachers=teachers,
        unlabelled=unlabelled,
        certain={picture.path for picture in more},
        captions={path: boxes for folder in arguments.drawn for path, boxes in read_captions(folder).items()},
    )
    network = drop_group_outputs(average.get_submodule("network"))
    centre_classifier(network)
    network.half().float()  # as it will be saved
    preprocessing = Preprocessing(INPUT_SIZE)
    unknown = unseen_sources(held_out, pictures)
    calibration, shift, probability, is_meme = calibrate(for_inference(network), preprocessing, unknown)
    network.load_state_dict(shifted(network.state_dict(), shift))
    accuracy = share((probability >= calibration.threshold) == is_meme)
    save_checkpoint(
        arguments.out,
        network,
        preprocessing,
        **asdict(calibration),
        about={
            "created": datetime.now(UTC).date().isoformat(),
            "trained_on": dict(Counter(picture.label for picture in pictures)),
            "drawn": dict(Counter(picture.label for picture in more)),
            "unlabelled": len(unlabelled),
            "data_sha256": fingerprint(pictures),
            "teacher": asdict(TEACHER),
            "student": asdict(STUDENT),
            "histories": {name: [asdict(entry) for entry in history] for name, history in histories.items()},
            "validation_accuracy": asdict(accuracy),
        },
    )
    plot_history(arguments.plot, histories)
    print(f"{arguments.out}: {accuracy.value:.1%} of {len(is_meme)} validation pictures right")
    print(f"SHA-256 {Classifier.load(arguments.out).sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
