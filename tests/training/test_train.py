import hashlib
import math
import shutil
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from commands import run
from pictures import noise
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import WeightsEnum

from engine import TORCH
from evaluation.dataset import LabelledPicture, read_folder
from model import CLASSES, DEFAULT_CHECKPOINT, MEME, NOT_MEME, Classifier, Preprocessing, build_network
from training import train
from training.calibrate import calibrate
from training.train import TrainingConfig, TrainingStream, balanced_weights, hold_out, unseen_sources


def labelled(label: str, source: str, count: int, group: str = "group") -> list[LabelledPicture]:
    return [LabelledPicture(Path(label) / source / str(n), label, group, source) for n in range(count)]


def test_draws_are_balanced_by_class_group_and_source() -> None:
    pictures = labelled(MEME, "big", 900) + labelled(MEME, "small", 9)
    pictures += labelled(NOT_MEME, "forest", 10_000, "photo") + labelled(NOT_MEME, "cinema", 16, "poster")
    total: dict[str, float] = defaultdict(float)
    for picture, weight in zip(pictures, balanced_weights(pictures), strict=True):
        total[picture.source] += weight
    assert total["big"] + total["small"] == pytest.approx(0.5 * sum(total.values()))
    assert total["big"] / total["small"] == pytest.approx(10)  # the root of 900 / 9
    assert total["forest"] / total["cinema"] == pytest.approx(5)  # the fourth root of 10,000 / 16


def test_the_same_step_draws_the_same_pictures(folder: Path) -> None:
    def draw(first_step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stream = TrainingStream(read_folder(folder), {32, 48}, first_step)
        inputs, truth, _ = next(iter(DataLoader(stream, 40)))
        return inputs[32], inputs[48], truth

    small, large, truth = draw(0)
    assert torch.equal(draw(0)[0], small)
    assert not torch.equal(draw(1)[0], small)
    assert 8 < truth[:, 0].sum() < 32
    assert small.shape == (40, 3, 32, 32)
    halved = nn.functional.interpolate(large, 32, mode="bilinear", antialias=True)
    assert (halved - small).abs().mean() < 0.1 < (halved - small.roll(1, 0)).abs().mean()  # of the same crop


def test_each_picture_comes_with_its_class_and_group(folder: Path) -> None:
    pictures = read_folder(folder)
    assert train.groups_of(pictures) == ["four", "meme", "poster"]
    certain = [picture.path for picture in pictures if picture.group == "poster"]
    _, truth, places = next(iter(DataLoader(TrainingStream(pictures, {32}, 0, certain=certain), 60)))
    seen = {(CLASSES[label], train.groups_of(pictures)[group]) for label, group, _ in truth.tolist()}
    assert seen == {(MEME, "meme"), (NOT_MEME, "poster"), (NOT_MEME, "four")}
    assert torch.equal(truth[:, 2] == 1, truth[:, 1] == train.groups_of(pictures).index("poster"))
    assert not places.any()


def test_known_captions_come_as_the_cells_that_they_cover(folder: Path) -> None:
    pictures = read_folder(folder)
    chosen = next(picture.path for picture in pictures if picture.label == MEME)
    stream = TrainingStream(pictures, {32}, 0, captions={chosen: [(0, 0, 1, 0.2)]})
    _, truth, places = next(iter(DataLoader(stream, 400)))
    known = places.any((1, 2))
    assert 0.5 * train.CAPTIONED < known.float().mean() < 1.5 * train.CAPTIONED
    assert (truth[known, 0] == CLASSES.index(MEME)).all()
    assert (places[known, 0] == 1).all()
    assert not places[:, 1:].any()


def test_a_caption_marks_the_cells_of_which_it_covers_most() -> None:
    across = train.cells([(0.1, 0.05, 0.9, 0.25)])  # three quarters of the first row, a quarter of the second
    expected = torch.zeros(5, 5)
    expected[0] = 1  # at its ends it covers half as much of a cell
    assert torch.equal(across, expected)
    assert train.cells([(0, 0, 0.2, 0.2), (0.81, 0.81, 1, 1)]).nonzero().tolist() == [[0, 0], [4, 4]]
    assert not train.cells([]).any()


def test_evidence_at_the_captions_is_found_and_elsewhere_is_lost() -> None:
    places = torch.zeros(2, 5, 5)
    places[0, 0] = 1  # the second picture's captions are not known
    there, elsewhere = torch.zeros(2, 2, 2, 5, 5)
    there[:, CLASSES.index(MEME), 0, 2] = 9
    elsewhere[:, CLASSES.index(MEME), 3, 2] = 9
    assert train.caption_loss(there, places) < 0.01
    assert train.caption_loss(elsewhere, places) == pytest.approx(9 / 2, abs=0.9)
    assert train.caption_loss(torch.zeros(2, 2, 5, 5), places) == pytest.approx(math.log(5) / 2)
    assert train.caption_loss(elsewhere, torch.zeros(2, 5, 5)) == 0


def test_a_certain_label_stands_against_the_teacher() -> None:
    taught = torch.tensor([[0.0, 9.0, 0.0, 9.0]])
    said = torch.tensor([[5.0, 0.0, 5.0, 0.0]])
    certain, doubtful = (train.distillation_loss(said, torch.tensor([[0, 0, sure]]), taught) for sure in (1, 0))
    assert certain == train.distillation_loss(said, torch.tensor([[0, 0, 1]]), None)
    assert doubtful > certain + 3


def test_the_loss_is_least_between_label_and_teacher() -> None:
    """Reference: a grid of all answers that a network could give about one picture of two classes and two groups."""
    taught = torch.tensor([[0.0, 2.0, 1.0, -1.0]])  # the teacher says the second class, the first group
    truth = torch.tensor([[0, 0, 0]])
    share = torch.linspace(0.01, 0.99, 99)
    for teacher, expected in (
        (None, 1 - train.LABEL_SMOOTHING / 2),
        (
            taught,
            (train.LABEL_WEIGHT * (1 - train.LABEL_SMOOTHING / 2) + taught[0, :2].softmax(0)[0])
            / (train.LABEL_WEIGHT + 1),
        ),
    ):
        logits = [torch.tensor([[math.log(p), math.log(1 - p), 0.0, 0.0]]) for p in share.tolist()]
        losses = [float(train.distillation_loss(one, truth, teacher)) for one in logits]
        assert float(share[int(np.argmin(losses))]) == pytest.approx(float(expected), abs=0.01)
    right_group, wrong_group = (torch.tensor([[0.0, 0.0, sign, -sign]]) for sign in (1.0, -1.0))
    assert train.distillation_loss(right_group, truth, None) < train.distillation_loss(wrong_group, truth, None)


def test_without_a_label_only_the_teacher_counts() -> None:
    taught = torch.tensor([[0.0, 2.0, 1.0, -1.0]] * 2)
    truth = torch.tensor([train.UNKNOWN, [0, 0, 0]])
    logits = torch.zeros(2, 4, requires_grad=True)
    train.distillation_loss(logits, truth, taught).backward()
    assert logits.grad is not None
    expected = (logits.detach().softmax(1)[0, :2] * 2 - taught[0, :2].softmax(0)) / 2  # of the mean over both rows
    torch.testing.assert_close(logits.grad[0, :2], expected)


def test_every_second_picture_may_come_without_a_label(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (1, 2, 3)).save(tmp_path / "unlabelled.png")
    stream = TrainingStream(read_folder(folder), {32}, 0, unlabelled=[tmp_path / "unlabelled.png"])
    inputs, truth, _ = next(iter(DataLoader(stream, 200)))
    assert (truth[1::2] == torch.tensor(train.UNKNOWN)).all()
    assert (truth[::2] >= 0).all()
    flat = inputs[32].flatten(2).std(2).amax(1) < 0.05  # of one colour, but for JPEG
    assert not flat[::2].any()
    assert 5 < flat[1::2].sum() < 30


def test_the_groups_outputs_go_and_the_classes_stay() -> None:
    torch.manual_seed(0)
    network = build_network(7).eval()
    inputs = torch.randn(2, 3, 64, 64)
    smaller = train.drop_group_outputs(network)
    torch.testing.assert_close(smaller(inputs), network(inputs)[:, :2])
    assert not any(parameter.requires_grad for parameter in smaller.parameters())


def test_two_workers_draw_different_pictures(folder: Path) -> None:
    stream = TrainingStream(read_folder(folder), {32}, 0)
    batches = iter(DataLoader(stream, 4, num_workers=2))
    inputs = [next(batches)[0][32] for _ in range(4)]
    assert not any(torch.equal(one, other) for one, other in combinations(inputs, 2))


def test_training_goes_past_a_bad_picture_and_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "meme" / "one" / "0.png").write_bytes(b"no picture")
    stream = iter(TrainingStream(read_folder(folder), {32}, 0))
    for _ in range(60):
        next(stream)
    assert "0.png: This file is not a picture" in capsys.readouterr().err


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


def test_the_fingerprint_is_the_one_that_checkpoints_record(tmp_path: Path) -> None:
    pictures = []
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(b"four")
        pictures.append(LabelledPicture(tmp_path / name, MEME, MEME, "one"))
    lines = [f"meme/{tmp_path.name}/{name} 4" for name in ("a.png", "b.png")]
    assert train.fingerprint(pictures) == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [train.schedule(n / 100, 0.3) for n in range(101)]
    peak = int(np.argmax(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[10] == rates[60] == 1
    assert rates[85] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert {train.schedule(n / 100, 0) for n in range(5, 101)} == {1}


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
    """Two teachers' steps, then four steps of four pictures, saved after each."""
    monkeypatch.setattr(train, "TEACHER", TrainingConfig(192, 4, 1e-4, 0.9, 0.3))
    monkeypatch.setattr(train, "STUDENT", TrainingConfig(64, 16, 1e-3, 0.9, 0))
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "INPUT_SIZE", 64)
    monkeypatch.setattr(train, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "best_engine", lambda: TORCH)  # compiling takes longer than all steps


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_resumes_and_gives_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the first step of either teacher, in that of their pupil and in its last."""
    init = tmp_path / "init.pth"
    torch.manual_seed(0)
    weights = build_network().state_dict()
    torch.save({name: tensor.half() for name, tensor in weights.items() if "classifier" not in name}, init)
    out = tmp_path / "out.pth"
    whole_schedule = train.schedule
    calls: list[float] = []
    validated: list[tuple[float, float]] = []
    validate = train.validate

    def spy(*given: Any) -> tuple[float, float]:
        validated.append(validate(*given))
        return validated[-1]

    monkeypatch.setattr(train, "validate", spy)
    monkeypatch.setattr(train, "VALIDATE_EVERY", 2)

    def interrupted(progress: float, fall: float) -> float:
        calls.append(progress)
        if len(calls) in (1, 3, 5, 9):
            raise KeyboardInterrupt
        return whole_schedule(progress, fall)

    monkeypatch.setattr(train, "schedule", interrupted)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, train.main, None, folder, "--out", out, "--init", init, "--resume")
        assert not out.exists()
    plot = tmp_path / "training.png"
    assert run(monkeypatch, train.main, None, folder, "--out", out, "--init", init, "--resume", "--plot", plot) == 0
    assert calls == [0, 0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 0.75]
    assert Image.open(plot).width > 600
    assert "validation pictures right" in capsys.readouterr().out

    classifier = Classifier.load(out)
    assert classifier.preprocessing.input_size == 64
    assert classifier.about["student"] == {
        "input_size": 64,
        "pictures": 16,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "fall": 0,
    }
    history = [entry for history in classifier.about["histories"].values() for entry in history]
    assert [(e["validation_accuracy"], e["validation_auroc"]) for e in history] == validated
    assert [entry["pictures"] for entry in history] == [4, 4, 8, 16]
    assert 0 <= classifier.not_sure[0] <= classifier.threshold <= classifier.not_sure[1] <= 1
    (prediction,) = classifier.predict([noise(60, 40)])
    assert math.isfinite(prediction.meme_probability)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_processor_trains_in_the_number_format_that_it_is_made_for(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, bfloat16 took eight times as long as full precision."""
    monkeypatch.setattr(train, "fastest_dtype", lambda: dtype)
    with train.fastest_autocast(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


@pytest.mark.usefixtures("quick")
def test_a_run_does_not_resume_on_other_pictures(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TEACHERS", 1)
    out = tmp_path / "out.pth"
    arguments = (folder, "--out", out, "--val", folder, "--plot", tmp_path / "training.png")
    assert run(monkeypatch, train.main, None, *arguments) == 0
    refused = pytest.raises(SystemExit, match="is of a run on other pictures")
    with refused:
        run(monkeypatch, train.main, None, *arguments, "--resume", "--unlabelled", folder)
    (folder / "meme" / "one" / "0.png").unlink()
    with refused:
        run(monkeypatch, train.main, None, *arguments, "--resume")


@pytest.mark.parametrize("weights", [{"fc.weight": torch.zeros(2)}, torch.zeros(3)])
def test_foreign_initial_weights_are_refused_in_a_sentence(weights: object, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save(weights, path)
    with pytest.raises(SystemExit, match="DenseNet121's weights"):
        train.load_initial_weights(build_network(), str(path))


def test_imagenet_starts_from_torchvisions_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    published = torchvision.models.densenet121()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: published.state_dict())
    network = build_network()
    classifier = network.get_parameter("classifier.weight").clone()
    train.load_initial_weights(network, "imagenet")
    torch.testing.assert_close(network.get_submodule("features").state_dict(), published.features.state_dict())
    torch.testing.assert_close(network.get_parameter("classifier.weight"), classifier)


def test_the_sources_that_training_knew_do_not_calibrate(
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
    monkeypatch.setattr(train, "TEACHER", TrainingConfig(192, 4, 1e-4, 0.9, 0.3))
    monkeypatch.setattr(train, "STUDENT", TrainingConfig(32, 4, 1e-3, 0.9, 0))
    monkeypatch.setattr(train, "BATCH", 4)  # and the teacher compiled, where that can be done
    monkeypatch.setattr(train, "TEACHERS", 1)
    arguments = ("--val", validation, "--out", tmp_path / "out.pth", "--plot", tmp_path / "training.png")
    assert run(monkeypatch, train.main, None, folder, *arguments) == 0
    assert {picture.source for picture in asked} == {"one-unknown", "four-unknown"}


@pytest.mark.usefixtures("quick")
def test_it_starts_from_a_classifier_and_takes_more_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "TEACHERS", 1)
    drawn = tmp_path / "drawn"
    shutil.copytree(folder, drawn)
    arguments = ("--drawn", drawn, "--unlabelled", folder, "--plot", tmp_path / "training.png")
    out = tmp_path / "out.pth"
    assert run(monkeypatch, train.main, None, folder, "--init", DEFAULT_CHECKPOINT, "--out", out, *arguments) == 0
    about = Classifier.load(out).about
    pictures = read_folder(folder)
    assert about["drawn"] == dict(Counter(picture.label for picture in pictures))
    assert about["unlabelled"] == len(pictures)
    ours, theirs = (
        Classifier.load(path).network.get_parameter("classifier.weight") for path in (out, DEFAULT_CHECKPOINT)
    )
    assert nn.functional.cosine_similarity(ours, theirs).min() > 0.9
    (drawn / "not_meme" / "four").rename(drawn / "not_meme" / "poem__four")
    with pytest.raises(SystemExit):
        run(monkeypatch, train.main, None, folder, "--out", out, *arguments)
    assert "there are no pictures of the groups poem" in capsys.readouterr().err


def test_networks_are_averaged_weight_by_weight() -> None:
    networks = [nn.BatchNorm2d(3) for _ in range(2)]
    for value, network in enumerate(networks):
        nn.init.constant_(network.weight, value)
        network.running_mean = torch.full((3,), 3.0 * value)
        network.num_batches_tracked = torch.tensor(4 * value)
    mean = train.average_weights(networks).state_dict()
    assert [mean["weight"][0], mean["running_mean"][0], mean["num_batches_tracked"]] == [0.5, 1.5, 2]
    assert mean["num_batches_tracked"].dtype == torch.int64


def test_folders_without_both_classes_are_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, train.main, None, tmp_path)
    assert stop.value.code == 2
    assert "there must be pictures below both" in capsys.readouterr().err
