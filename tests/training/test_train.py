import math
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from pictures import noise
from PIL import Image
from tiny import build_tiny_network
from torch import nn
from training_pictures import labelled

import model
from engine import TORCH
from evaluation.dataset import LabelledPicture, plain_network, read_folder, unseen_sources
from model import CLASSES, DEFAULT_CHECKPOINT, MEME, NOT_MEME, Classifier, Preprocessing, build_network
from training import distillation, teacher, train
from training.calibrate import calibrate
from training.distillation import TrainingConfig
from training.train import hold_out

STUDENT = TrainingConfig(64, 8, 1e-3, 0.9, 0, bfloat16=False)


def test_the_groups_outputs_go_and_the_classes_stay() -> None:
    torch.manual_seed(0)
    network = build_network(7).eval()
    inputs = torch.randn(2, 3, 64, 64)
    smaller = train.drop_group_outputs(network)
    torch.testing.assert_close(smaller(inputs), network(inputs)[:, :2])
    assert not any(parameter.requires_grad for parameter in smaller.parameters())


def test_whole_sources_are_held_out() -> None:
    pictures = [p for n in range(12) for p in labelled(MEME, f"m{n}", 10) + labelled(NOT_MEME, f"n{n}", 10)]
    kept, aside = hold_out(pictures)
    assert len(kept) + len(aside) == len(pictures)
    assert not {p.source for p in kept} & {p.source for p in aside}
    assert all(0.05 < count / 120 < 0.25 for count in Counter(p.label for p in aside).values())


def test_a_large_source_is_not_taken_whole() -> None:
    pictures = labelled(MEME, "big", 900) + labelled(MEME, "small", 100)
    pictures += labelled(NOT_MEME, "half", 500) + labelled(NOT_MEME, "other half", 500)
    kept, aside = hold_out(pictures)
    assert {p.source for p in aside if p.label == MEME} == {"small"}
    assert Counter(p.label for p in aside) == {MEME: 100, NOT_MEME: 100}
    assert len(kept) == 1800


def test_a_class_without_unknown_sources_calibrates_on_what_there_is() -> None:
    pictures = labelled(MEME, "big", 900) + [p for n in range(12) for p in labelled(NOT_MEME, f"n{n}", 100)]
    kept, aside = hold_out(pictures)
    chosen = unseen_sources(aside, kept)
    assert Counter(p.label for p in chosen) == Counter(p.label for p in aside) == {MEME: 90, NOT_MEME: 200}
    easy = [picture for picture in kept if picture.label == NOT_MEME][:50]
    assert unseen_sources(easy + aside, kept) == aside


def test_a_single_source_is_split() -> None:
    kept, aside = hold_out(labelled(MEME, "m", 20) + labelled(NOT_MEME, "n", 20))
    assert Counter(p.label for p in aside) == {MEME: 2, NOT_MEME: 2}
    assert len(kept) == 36


def test_the_last_source_of_a_group_is_not_held_out() -> None:
    pictures = [p for n in range(9) for p in labelled(MEME, f"m{n}", 10) + labelled(NOT_MEME, f"n{n}", 10)]
    for group in ("card", "poster", "document"):
        pictures += labelled(NOT_MEME, f"{group}s", 10, group)
    kept, aside = hold_out(pictures)
    assert {p.group for p in kept} == {p.group for p in pictures}
    assert len({p.source for p in aside if p.label == NOT_MEME}) > 0


def test_centring_changes_no_probability() -> None:
    network = nn.Sequential(nn.Linear(1, 1))
    network.add_module("classifier", nn.Linear(1, 2).requires_grad_(False))
    inputs = torch.randn(5, 1)
    before = network(inputs).detach()
    train.centre_classifier(network)
    after = network(inputs).detach()
    torch.testing.assert_close(after.softmax(1), before.softmax(1))
    torch.testing.assert_close(after[:, 0], -after[:, 1])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the teacher, then two legs of a tiny student, of two steps of four pictures, saved after each."""

    def build_trainable_network(outputs: int = len(CLASSES)) -> nn.Module:
        return build_tiny_network(outputs).requires_grad_(True)

    for module in (train, teacher, model):
        monkeypatch.setattr(module, "build_network", build_trainable_network)
    monkeypatch.setattr(train, "TEACHER", TrainingConfig(192, 4, 1e-4, 0.9, 0.3, bfloat16=False))
    monkeypatch.setattr(train, "STUDENT", STUDENT)
    monkeypatch.setattr(train, "LEGS", 2)
    monkeypatch.setattr(train, "INPUT_SIZE", 64)
    monkeypatch.setattr(train, "best_engine", lambda: TORCH)  # compiling takes longer than all steps
    monkeypatch.setattr(distillation, "BATCH", 4)
    monkeypatch.setattr(distillation, "SAVE_EVERY", -1)


def save_initial_weights(path: Path) -> Path:
    """Save the tiny network's weights without those of its classifier."""
    weights = build_tiny_network().state_dict()
    torch.save({name: tensor.half() for name, tensor in weights.items() if "classifier" not in name}, path)
    return path


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_resumes_and_gives_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the only step of the teacher, in the student's first, in the last of leg 1 and of leg 2."""
    init, out, plot = save_initial_weights(tmp_path / "init.pth"), tmp_path / "out.pth", tmp_path / "training.png"
    whole_schedule, validate = distillation.learning_rate_factor, distillation.validate
    calls: list[float] = []
    validated: list[tuple[float, float]] = []

    def interrupted(progress: float, decay_share: float) -> float:
        calls.append(progress)
        if len(calls) in (1, 3, 5, 8):
            raise KeyboardInterrupt
        return whole_schedule(progress, decay_share)

    def spy(*given: Any) -> tuple[float, float]:
        validated.append(validate(*given))
        return validated[-1]

    monkeypatch.setattr(distillation, "learning_rate_factor", interrupted)
    monkeypatch.setattr(distillation, "validate", spy)
    arguments = (folder, "--out", out, "--init", init, "--plot", plot, "--resume")
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, train.main, None, *arguments)
        assert not out.exists()
    assert run(monkeypatch, train.main, None, *arguments) == 0
    assert calls == [0, 0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5]
    with Image.open(plot) as drawn:
        assert drawn.width > 600
    assert "validation pictures right" in capsys.readouterr().out

    classifier = Classifier.load(out)
    assert classifier.preprocessing.input_size == 64
    assert classifier.about["student"] == asdict(STUDENT)
    histories = classifier.about["histories"]
    assert list(histories) == ["teacher", "leg 1", "leg 2"]
    history = [entry for name in histories for entry in histories[name]]
    assert [(e["validation_accuracy"], e["validation_auroc"]) for e in history] == validated
    assert [entry["pictures"] for entry in history] == [4, 8, 8]
    states = [torch.load(out.with_suffix(f".leg-{leg}.resume.pth"), weights_only=True) for leg in range(2)]
    assert [state["run"]["seed"] for state in states] == [0, 1]  # each leg draws other pictures
    assert 0 <= classifier.not_sure[0] <= classifier.threshold <= classifier.not_sure[1] <= 1
    (prediction,) = classifier.predict([noise(60, 40)])
    assert math.isfinite(prediction.meme_probability)


@pytest.mark.usefixtures("quick")
def test_a_leg_starts_in_the_middle_of_the_last_one_and_the_last_one_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[torch.Tensor, torch.Tensor]] = []

    def weights(student: teacher.DistillationStudent) -> torch.Tensor:
        return student.network.get_parameter("classifier.weight")[:2].detach().clone()

    def spy(student: teacher.DistillationStudent, *given: Any, **named: Any) -> Any:
        start = weights(student)
        trained, history = distillation.train(student, *given, **named)
        ends.append((start, weights(trained)))
        return trained, history

    monkeypatch.setattr(train, "train", spy)
    monkeypatch.setattr(train, "STUDENT", replace(STUDENT, learning_rate=0.1))
    pictures = read_folder(folder)
    student = train.build_student(5, None)
    network, _ = train.distil(
        student, teacher.Teacher(5).eval(), pictures, pictures, tmp_path / "out.pth", unlabelled=[], resume=False
    )
    (start, end), (second_start, second_end) = ends
    assert (end - start).abs().max() > 1e-3
    torch.testing.assert_close(second_start, (start + end) / 2)
    torch.testing.assert_close(network.get_parameter("classifier.weight"), second_end)


@pytest.mark.usefixtures("quick")
def test_a_run_does_not_resume_on_other_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (folder, "--out", tmp_path / "out.pth", "--val", folder, "--plot", tmp_path / "training.png")
    assert run(monkeypatch, train.main, None, *arguments) == 0
    refused = pytest.raises(SystemExit, match="belongs to a run on other pictures")
    with refused:
        run(monkeypatch, train.main, None, *arguments, "--resume", "--unlabelled", folder)
    (folder / "meme" / "one" / "0.png").unlink()
    with refused:
        run(monkeypatch, train.main, None, *arguments, "--resume")


@pytest.mark.parametrize("weights", [{"fc.weight": torch.zeros(2)}, torch.zeros(3), {"state_dict": 3}])
def test_foreign_initial_weights_are_refused_in_a_sentence(weights: object, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(weights, path)
    with pytest.raises(SystemExit, match="DenseNet121's weights"):
        train.build_student(5, path)


def test_a_student_starts_from_a_checkpoint_and_keeps_its_answers() -> None:
    student = train.build_student(7, DEFAULT_CHECKPOINT).eval()
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(student.network(inputs)[:, :2], plain_network()(inputs), rtol=1e-4, atol=1e-4)
    assert student.network(inputs).shape == (2, 7)


@pytest.mark.usefixtures("quick")
def test_sources_that_training_knew_do_not_calibrate(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = tmp_path / "validation"
    shutil.copytree(folder, validation)
    for source in ("meme/one", "not_meme/four"):
        (validation / source).rename(validation / f"{source}-unknown")
    asked: list[LabelledPicture] = []

    def spy(network: nn.Module, preprocessing: Preprocessing, pictures: list[LabelledPicture]) -> Any:
        asked.extend(pictures)
        return calibrate(network, preprocessing, pictures)

    monkeypatch.setattr(train, "calibrate", spy)
    monkeypatch.setattr(train, "LEGS", 1)
    arguments = ("--val", validation, "--out", tmp_path / "out.pth", "--plot", tmp_path / "training.png")
    assert run(monkeypatch, train.main, None, folder, *arguments, "--unlabelled", folder) == 0
    assert {picture.source for picture in asked} == {"one-unknown", "four-unknown"}
    about = Classifier.load(tmp_path / "out.pth").about
    pictures = read_folder(folder)
    assert about["trained_on"] == dict(Counter(picture.label for picture in pictures))
    assert about["unlabelled"] == len(pictures)


def test_folders_without_both_classes_are_wrong_usage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in ((tmp_path / "empty",), (folder, "--val", tmp_path / "empty")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, train.main, None, *arguments)
        assert stop.value.code == 2
        assert "there must be pictures in both" in capsys.readouterr().err
