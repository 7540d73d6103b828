import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny import build_tiny_network
from torch import nn

from evaluation.dataset import LabelledPicture, read_folder
from images import open_picture
from model import MEME, Preprocessing
from training import distillation
from training.distillation import (
    LABEL_SMOOTHING,
    LABEL_WEIGHT,
    TrainingConfig,
    autocast,
    average_weights,
    distillation_loss,
    fingerprint,
    learning_rate_factor,
    teacher_outputs,
    validate,
)
from training.stream import NO_LABEL

CONFIG = TrainingConfig(input_size=64, pictures=8, learning_rate=1e-3, ema_decay=0.9, decay_share=0.3, bfloat16=False)


def test_the_loss_is_least_between_label_and_teacher() -> None:
    """Reference: a grid of all answers that a network could give about one picture of two classes and two groups."""
    taught = torch.tensor([[0.0, 2.0, 1.0, -1.0]])  # the teacher says the second class, the first group
    target = torch.tensor([[0, 0]])
    share = torch.linspace(0.01, 0.99, 99)
    label = 1 - LABEL_SMOOTHING / 2
    for teacher, expected in (
        (None, label),
        (taught, (LABEL_WEIGHT * label + float(taught[0, :2].softmax(0)[0])) / (LABEL_WEIGHT + 1)),
    ):
        logits = [torch.tensor([[math.log(p), math.log(1 - p), 0.0, 0.0]]) for p in share.tolist()]
        losses = [float(distillation_loss(one, target, teacher)) for one in logits]
        assert float(share[int(np.argmin(losses))]) == pytest.approx(expected, abs=0.01)
    right_group, wrong_group = (torch.tensor([[0.0, 0.0, sign, -sign]]) for sign in (1.0, -1.0))
    assert distillation_loss(right_group, target, None) < distillation_loss(wrong_group, target, None)


def test_without_a_label_only_the_teacher_counts() -> None:
    taught = torch.tensor([[0.0, 2.0, 1.0, -1.0]] * 2)
    target = torch.tensor([[NO_LABEL, NO_LABEL], [0, 0]])
    logits = torch.zeros(2, 4, requires_grad=True)
    distillation_loss(logits, target, taught).backward()
    assert logits.grad is not None
    expected = (0.5 - taught[0, :2].softmax(0)) / 2  # of the mean over both rows
    torch.testing.assert_close(logits.grad[0, :2], expected)


def test_teachers_are_averaged_for_the_classes_only() -> None:
    inputs = {32: torch.ones(4, 3, 32, 32), 64: torch.zeros(4, 3, 64, 64)}
    teachers = [(Fixed([1, 3, 5], feature_map=True), 32), (Fixed([3, -1], feature_map=False), 64)]
    logits, feature_map = teacher_outputs(teachers, inputs, torch.device("cpu"))
    assert logits.tolist() == [[2.0, 1.0, 5.0]] * 4
    assert torch.equal(feature_map, inputs[32][:, :1])


class Fixed(nn.Module):
    """Gives the same logits for every picture, and with them a feature map if asked for one."""

    def __init__(self, logits: list[float], *, feature_map: bool) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.feature_map = feature_map

    def forward(self, inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = self.logits.expand(len(inputs), -1)
        return (logits, inputs[:, :1]) if self.feature_map else logits


class WithFeatureMap(nn.Module):
    """A classifier that gives a feature map beside its logits, as networks in training do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(inputs), inputs


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate_factor(n / 100, 0.3) for n in range(101)]
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[10] == rates[60] == 1
    assert rates[85] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert {learning_rate_factor(n / 100, 0) for n in range(5, 101)} == {1}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("fastest", [torch.float32, torch.bfloat16])
def test_bfloat16_is_used_where_the_processor_has_it_and_the_network_gains(
    fastest: torch.dtype, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, bfloat16 took eight times as long as full precision."""
    monkeypatch.setattr(distillation, "fastest_dtype", lambda: fastest)
    config = TrainingConfig(64, 8, 1e-3, 0.9, 0.3, bfloat16=wanted)
    with autocast(torch.device("cpu"), config):
        dtype = nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    assert dtype == (torch.bfloat16 if wanted and fastest == torch.bfloat16 else torch.float32)


def test_validation_weighs_all_sources_alike(folder: Path) -> None:
    """Reference: scikit-learn's AUROC of every pair of sources."""
    for name in ("1.png", "2.png", "3.png"):
        (folder / "not_meme" / "four" / name).unlink()
    pictures = read_folder(folder)
    network = build_tiny_network()
    margins = {}
    for picture in pictures:
        (logits,) = network(Preprocessing(64)(open_picture(picture.path))[None])
        margins[picture.path] = float(logits[0] - logits[1])

    def of(label: str) -> list[list[float]]:
        sources = sorted({picture.source for picture in pictures if picture.label == label})
        return [[margins[p.path] for p in pictures if p.label == label and p.source == s] for s in sources]

    memes, others = of("meme"), of("not_meme")
    areas = [roc_auc_score([1] * len(m) + [0] * len(o), m + o) for m in memes for o in others]
    right = [np.mean([x > 0 for x in m]) for m in memes], [np.mean([x <= 0 for x in o]) for o in others]
    accuracy, auroc = validate(WithFeatureMap(network), CONFIG, pictures, torch.device("cpu"))
    assert auroc == pytest.approx(np.mean(areas))
    assert accuracy == pytest.approx(np.mean([np.mean(right[0]), np.mean(right[1])]))


def test_networks_are_averaged_weight_by_weight() -> None:
    networks = [nn.BatchNorm2d(3) for _ in range(2)]
    for value, network in enumerate(networks):
        nn.init.constant_(network.weight, value)
        network.running_mean = torch.full((3,), 3.0 * value)
        network.num_batches_tracked = torch.tensor(4 * value)
    mean = average_weights(networks).state_dict()
    assert [mean["weight"][0], mean["running_mean"][0], mean["num_batches_tracked"]] == [0.5, 1.5, 2]
    assert mean["num_batches_tracked"].dtype == torch.int64


def test_the_fingerprint_is_the_one_that_checkpoints_record(tmp_path: Path) -> None:
    pictures = []
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(b"four")
        pictures.append(LabelledPicture(tmp_path / name, MEME, MEME, "one"))
    lines = [f"meme/{tmp_path.name}/{name} 4" for name in ("a.png", "b.png")]
    assert fingerprint(pictures) == hashlib.sha256("\n".join(lines).encode()).hexdigest()
