"""The losses and the training loop: fine-tuning a teacher, and distilling teachers into DenseNet121."""

import hashlib
import math
import os
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluation.dataset import LabelledPicture, open_batches
from evaluation.metrics import source_mean_accuracy, source_mean_auroc
from model import CLASSES, MEME, Preprocessing, fastest_dtype, save_atomically
from training.augment import mix
from training.stream import NO_LABEL, TrainingStream
from training.teacher import DistillationStudent

BATCH = 64
WARM_UP = 0.04  # share of all steps
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1  # 1-5 % of the memes' labels are wrong
LABEL_WEIGHT = 0.6  # relative to the teachers' answers
GROUP_WEIGHT = 0.5  # of the group's cross-entropy, relative to the class's
FEATURE_WEIGHT = 1.5  # of the distance between feature maps
SAVE_EVERY = 120  # seconds
VALIDATE_EVERY = 200  # steps

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How one network is trained.

    Attributes:
        input_size: in pixels.
        pictures: number of draws.
        learning_rate: peak of `learning_rate_factor`.
        ema_decay: of the moving average of the weights, which is the result.
        decay_share: share of the steps in which the rate falls to zero.
        bfloat16: whether a processor that multiplies bfloat16 in hardware should use it.
    """

    input_size: int
    pictures: int
    learning_rate: float
    ema_decay: float
    decay_share: float
    bfloat16: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """One validation; the loss is the mean since the last one, the other figures are the averaged network's.

    Attributes:
        pictures: draws so far.
        loss: weighted sum of the cross-entropies and distances.
        validation_accuracy: at even odds, mean over the sources.
        validation_auroc: mean over the sources.
    """

    pictures: int
    loss: float
    validation_accuracy: float
    validation_auroc: float


def train(
    network: Network,
    config: TrainingConfig,
    pictures: list[LabelledPicture],
    held_out: list[LabelledPicture],
    state: Path,
    *,
    resume: bool,
    teachers: Sequence[tuple[nn.Module, int]] = (),
    unlabelled: list[Path] | None = None,
    seed: int = 0,
) -> tuple[Network, list[Progress]]:
    """Train a network, or finish an interrupted run.

    Args:
        network: (N, 3, S, S) -> logits of the classes and the groups, and a feature map; trained in place.
        config: how.
        pictures: what to train on.
        held_out: what to validate on.
        state: file of the run's state; read when resuming, written every `SAVE_EVERY` seconds.
        resume: continue from `state` if it exists.
        teachers: see `teacher_outputs`; they see the same crops. `network` is then a `DistillationStudent`.
        unlabelled: see `TrainingStream`.
        seed: seed of the draws.

    Returns:
        The network with averaged weights, frozen, and the history of its validation.

    Raises:
        SystemExit: if `state` belongs to a run on other pictures, settings or teachers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=WEIGHT_DECAY)
    parts: dict[str, Any] = {"network": network, "average": average, "optimizer": optimizer}
    run = {
        "data": fingerprint(pictures),
        "held_out": fingerprint(held_out),
        "config": asdict(config),
        "teachers": [
            digest(weights.cpu().contiguous().numpy().tobytes() for weights in teacher.state_dict().values())
            for teacher, _ in teachers
        ],
        "unlabelled": digest(sorted(map(name_and_size, unlabelled or ()))),
        "seed": seed,
    }
    step, history, losses = 0, list[Progress](), list[float]()
    if resume and state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        if saved["run"] != run:
            raise SystemExit(
                f"{state} belongs to a run on other pictures, settings or teachers; delete it to start anew."
            )
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        step = saved["step"]
        history, losses = [Progress(**entry) for entry in saved["history"]], saved["losses"]

    steps = config.pictures // BATCH
    stream = TrainingStream(
        pictures, {config.input_size, *(size for _, size in teachers)}, step, unlabelled=unlabelled, seed=seed
    )
    loader = DataLoader(stream, BATCH, num_workers=1 if device.type == "cpu" else 8, prefetch_factor=4)
    batches: Iterator[tuple[dict[int, Tensor], Tensor]] = iter(loader) if step < steps else iter(())
    saved_at = time.monotonic()
    progress = tqdm(total=steps, initial=step, unit="step", smoothing=0.05)
    while step < steps:
        inputs, target = next(batches)  # {S: (BATCH, 3, S, S)}, (BATCH, 2)
        without_label = (target[:, 0] == NO_LABEL).nonzero()[:, 0].tolist()
        inputs = mix(inputs, without_label, random.Random(f"{seed}-{step}"))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step / steps, config.decay_share)
        network.train()
        loss = training_step(network, config, teachers, inputs, target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        step += 1
        progress.update()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if step % VALIDATE_EVERY == 0 or step == steps:
            accuracy, auroc = validate(average.module, config, held_out, device)
            history.append(Progress(step * BATCH, float(np.mean(losses)), accuracy, auroc))
            losses = []
        if time.monotonic() - saved_at > SAVE_EVERY or step == steps:
            written = {"run": run, "step": step, "history": [asdict(entry) for entry in history], "losses": losses}
            save_atomically(written | {name: part.state_dict() for name, part in parts.items()}, state)
            saved_at = time.monotonic()
    return cast(Network, average.module.eval().requires_grad_(False)), history


def training_step(
    network: nn.Module,
    config: TrainingConfig,
    teachers: Sequence[tuple[nn.Module, int]],
    inputs: dict[int, Tensor],
    target: Tensor,
) -> Tensor:
    """The loss of one batch.

    Args:
        network: see `train`.
        config: see `train`.
        teachers: see `teacher_outputs`.
        inputs: the network's and its teachers' inputs, of shape (N, 3, S, S), by S.
        target: see `distillation_loss`.
    """
    device = target.device
    teacher_logits, teacher_map = teacher_outputs(teachers, inputs, device) if teachers else (None, None)
    with autocast(device, config):
        logits, feature_map = network(inputs[config.input_size].to(device, memory_format=torch.channels_last))
    loss = distillation_loss(logits.float(), target, teacher_logits)
    if isinstance(network, DistillationStudent) and teacher_map is not None:
        loss = loss + FEATURE_WEIGHT * network.feature_distance(feature_map.float(), teacher_map)
    return loss


def autocast(device: torch.device, config: TrainingConfig) -> torch.autocast:
    """Bfloat16 if the network wants it, on a GPU or a processor with hardware for it; elsewhere it is slower."""
    in_hardware = device.type != "cpu" or fastest_dtype() == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16 and in_hardware)


def teacher_outputs(
    teachers: Sequence[tuple[nn.Module, int]], inputs: dict[int, Tensor], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The mean of all teachers' logits of the classes; the first teacher's logits of the groups and its feature map.

    Args:
        teachers: networks with their input sizes; the first is a `Teacher`, the others return logits only.
        inputs: of shape (N, 3, S, S), by S.
        device: of the outputs.

    Returns:
        Logits of shape (N, C + G), and a feature map of shape (N, 1280, h, w).
    """
    (teacher, teacher_size), *others = teachers
    with torch.no_grad():
        logits, feature_map = teacher(inputs[teacher_size].to(device))
        answers = [logits, *(network(inputs[size].to(device)) for network, size in others)]
    classes = torch.stack([answer[:, : len(CLASSES)].float() for answer in answers]).mean(0)
    return torch.cat([classes, logits[:, len(CLASSES) :].float()], 1), feature_map.float()


def distillation_loss(logits: Tensor, target: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """Cross-entropy with the labels and with the teachers' answers, for the classes and for the groups.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, at temperature 1;
    also on pictures without a label, as in Beyer et al. 2022, arXiv 2106.05237.

    Args:
        logits: of the classes, then of the groups, shape (N, C + G).
        target: indices of class and group, or `NO_LABEL`, shape (N, 2).
        teacher_logits: the teachers' logits of the same pictures, if there are teachers.
    """
    sizes = [len(CLASSES), logits.shape[1] - len(CLASSES)]
    total = logits.new_zeros(())
    for part, weight in enumerate((1, GROUP_WEIGHT)):
        own = logits.split(sizes, 1)[part]
        loss = nn.functional.cross_entropy(
            own, target[:, part], ignore_index=NO_LABEL, label_smoothing=LABEL_SMOOTHING, reduction="none"
        )
        if teacher_logits is not None:
            soft = teacher_logits.split(sizes, 1)[part].softmax(1)
            loss = LABEL_WEIGHT * loss + nn.functional.cross_entropy(own, soft, reduction="none")
        total = total + weight * loss.mean()
    return total


def learning_rate_factor(progress: float, decay_share: float) -> float:
    """Share of the peak learning rate: linear warm-up, constant, and at the end half a cosine down to zero.

    A rate that falls for long fits the training sources better and new ones worse.
    """
    if progress < WARM_UP:
        return progress / WARM_UP + 1e-3
    if progress <= 1 - decay_share:
        return 1
    return 0.5 * (1 + math.cos(math.pi * (progress - 1 + decay_share) / decay_share))


def validate(
    network: nn.Module, config: TrainingConfig, pictures: list[LabelledPicture], device: torch.device
) -> tuple[float, float]:
    """Accuracy at even odds and AUROC on held-out pictures, both as means over the sources."""
    preprocessing = Preprocessing(config.input_size)
    margins: list[float] = []
    read: list[LabelledPicture] = []
    network.eval()
    for labelled, opened in open_batches(pictures):
        inputs = torch.stack([preprocessing(picture) for picture in opened]).to(device)
        with torch.inference_mode(), autocast(device, config):
            logits = network(inputs.to(memory_format=torch.channels_last))[0].float()
        meme = CLASSES.index(MEME)
        margins += (logits[:, meme] - logits[:, 1 - meme]).tolist()
        read += labelled
    is_meme, margin = np.array([picture.label == MEME for picture in read]), np.array(margins)
    sources = np.array([picture.source for picture in read])
    right = (margin > 0) == is_meme
    return source_mean_accuracy(is_meme, right, sources), source_mean_auroc(is_meme, margin, sources)


def average_weights(networks: Sequence[Network]) -> Network:
    """The first of several networks of one architecture, with the mean of all their weights.

    Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
    """
    states = [network.state_dict() for network in networks]
    mean = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
    networks[0].load_state_dict({name: mean[name].to(tensor.dtype) for name, tensor in states[0].items()})
    return networks[0]


def fingerprint(pictures: list[LabelledPicture]) -> str:
    """SHA-256 over the labels, names and sizes of the files, independent of where their folder is."""
    return digest(sorted(p.label.encode() + b"/" + name_and_size(p.path) for p in pictures))


def name_and_size(path: Path) -> bytes:
    """What identifies a file when its folder moves."""
    return os.fsencode(f"{path.parent.name}/{path.name} {path.stat().st_size}")


def digest(lines: Iterable[bytes]) -> str:
    """SHA-256 of some lines."""
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
