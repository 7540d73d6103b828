import ast
import dataclasses
import errno
import hashlib
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pictures import ROOT, noise
from PIL import Image
from torchvision.transforms.v2 import functional as F

from images import open_picture
from model import (
    CLASSES,
    DEFAULT_CHECKPOINT,
    MEME,
    NOT_MEME,
    NOT_SURE,
    ROUNDING,
    STRICTNESS,
    BadCheckpoint,
    Classifier,
    Preprocessing,
    build_network,
    digest_path,
    for_inference,
    write_checkpoint,
)
from model import save_checkpoint as save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A checkpoint with random weights, and the network that went into it."""
    torch.manual_seed(1)
    network = build_network().eval()
    path = tmp_path_factory.mktemp("checkpoint") / "best_model.pth"
    save(
        path,
        network,
        Preprocessing(96),
        temperature=1.25,
        threshold=0.6,
        not_sure=(0.5, 0.7),
        thresholds={"nearly_all": 0.4, "balanced": 0.6, "certain": 0.9},
        evidence_scales={"Grad-CAM": 3.0},
        about={"created": "2026-11-22"},
    )
    return path, network


def test_the_network_is_torchvisions(saved: tuple[Path, torch.nn.Module]) -> None:
    _, network = saved
    reference = torchvision.models.densenet121(num_classes=2).eval()
    reference.load_state_dict(network.state_dict(), strict=True)
    inputs = torch.randn(2, 3, 96, 96)
    assert torch.equal(network(inputs), reference(inputs))


def test_a_checkpoint_comes_back_as_it_was_saved(saved: tuple[Path, torch.nn.Module]) -> None:
    path, network = saved
    loaded = Classifier.load(path)
    assert loaded.classes == CLASSES
    assert loaded.preprocessing == Preprocessing(96)
    assert (loaded.temperature, loaded.threshold, loaded.not_sure) == (1.25, 0.6, (0.5, 0.7))
    assert loaded.thresholds == {"nearly_all": 0.4, "balanced": 0.6, "certain": 0.9}
    assert loaded.evidence_scales == {"Grad-CAM": 3.0}
    assert loaded.about == {"created": "2026-11-22"}
    assert len(loaded.sha256) == 64
    inputs = torch.randn(2, 3, 96, 96)
    # Half precision keeps 11 bits of every weight, bfloat16 8 bits of every product.
    torch.testing.assert_close(loaded.network(inputs), network(inputs), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_for_inference_gives_the_same_logits(
    dtype: torch.dtype, tolerance: float, classifier: Classifier, pictures: list[Image.Image]
) -> None:
    """The reference is torchvision's own network with the shipped weights."""
    checkpoint = torch.load(DEFAULT_CHECKPOINT, weights_only=True)
    reference = torchvision.models.densenet121(num_classes=2).eval()
    reference.load_state_dict(checkpoint["state_dict"])
    network = build_network()
    network.load_state_dict(checkpoint["state_dict"])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fast = for_inference(network, dtype)
    inputs = classifier.preprocess(pictures)
    with torch.inference_mode():
        expected = reference(inputs)
        assert (fast(inputs) - expected).abs().max() < tolerance * expected.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    # All 58 normalisations between two convolutions of a dense layer are folded, and the one of the stem.
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules()) == 121 - 59


def test_a_loaded_network_is_frozen(saved: tuple[Path, torch.nn.Module]) -> None:
    loaded = Classifier.load(saved[0])
    assert not any(module.training for module in loaded.network.modules())
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.threshold = 0.1  # type: ignore[misc]


def test_a_checkpoint_of_the_first_edition_has_one_threshold(
    saved: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    checkpoint = torch.load(saved[0], weights_only=True)
    del checkpoint["thresholds"]
    path = tmp_path / "first.pth"
    write_checkpoint(checkpoint, path)
    loaded = Classifier.load(path)
    assert loaded.thresholds == dict.fromkeys(STRICTNESS, loaded.threshold)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "empty", "noise", "flipped", "bomb", "module", "bare", "foreign", "fewer"]
)
def test_anything_but_our_checkpoint_gets_one_sentence(
    kind: str, saved: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = torch.load(saved[0], weights_only=True)
    path = tmp_path / "other.pth"
    if kind == "folder":
        path.mkdir()
    elif kind in ("empty", "noise"):
        path.write_bytes(b"" if kind == "empty" else bytes(range(256)) * 40)
    elif kind == "flipped":
        data = bytearray(saved[0].read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif kind == "bomb":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "bare":
        torch.save(good["state_dict"], path)
    elif kind == "foreign":
        torch.save(good | {"classes": ("cat", "dog")}, path)
    elif kind == "fewer":
        weights = dict(good["state_dict"])
        weights.pop("features.conv0.weight")
        torch.save(good | {"state_dict": weights}, path)
    with pytest.raises(
        BadCheckpoint, match=r"^The checkpoint other\.pth .*repository, or make one with `python -m training\.train`\.$"
    ):
        Classifier.load(path)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_is_the_one_whose_digest_is_recorded(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    path, recorded = tmp_path / "copy.pth", tmp_path / "copy.pth.sha256"
    shutil.copy(saved[0], path)
    Classifier.load(path)  # nothing is recorded
    shutil.copy(digest_path(saved[0]), recorded)
    digest, name = recorded.read_text().split()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert name == saved[0].name
    Classifier.load(path)
    torch.save(torch.load(path, weights_only=True) | {"threshold": 0.1}, path)  # as good, but another
    for content in (recorded.read_bytes(), b"", b"\xff\xfe"):
        recorded.write_bytes(content)
        with pytest.raises(BadCheckpoint, match=r"copy\.pth is not the one whose digest copy\.pth\.sha256 records"):
            Classifier.load(path)


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one_and_its_digest(
    saved: tuple[Path, torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(saved[0], tmp_path))
    recorded = Path(shutil.copy(digest_path(saved[0]), tmp_path))
    before = path.read_bytes(), recorded.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint({}, path)
    assert (path.read_bytes(), recorded.read_bytes()) == before


def test_the_shipped_checkpoints_digest_is_recorded() -> None:
    recorded = digest_path(DEFAULT_CHECKPOINT).read_text()
    assert recorded == f"{hashlib.sha256(DEFAULT_CHECKPOINT.read_bytes()).hexdigest()}  best_model.pth\n"


def test_every_load_is_of_weights_only() -> None:
    loads = [
        call
        for path in ROOT.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load"
    ]
    assert loads
    for call in loads:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"


def test_preprocessing_sees_the_whole_picture() -> None:
    wide = noise(300, 100)
    wide.paste((255, 0, 0), (0, 20, 30, 80))  # in the left tenth
    wide.paste((0, 0, 255), (270, 20, 300, 80))  # in the right tenth
    inputs = Preprocessing(100, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))(wide)
    assert inputs.shape == (3, 100, 100)
    assert inputs[:, 50, 4].tolist() == [1, 0, 0]
    assert inputs[:, 50, 95].tolist() == [0, 0, 1]


def test_preprocessing_normalises_like_torchvision() -> None:
    picture = noise(64, 64)
    ours = Preprocessing(64)(picture)
    reference = F.normalize(F.to_image(picture).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(ours, reference)


def test_a_picture_is_judged_alike_alone_and_among_others(
    tiny_classifier: Classifier, pictures: list[Image.Image]
) -> None:
    together = tiny_classifier.predict(pictures)
    alone = [tiny_classifier.predict([picture])[0] for picture in pictures]
    assert len({p.meme_probability for p in together}) == len(pictures)
    for one, other in zip(together, alone, strict=True):
        assert one.meme_probability == pytest.approx(other.meme_probability, abs=1e-5)


def test_no_pictures_no_predictions(tiny_classifier: Classifier) -> None:
    assert tiny_classifier.predict([]) == []


@pytest.mark.parametrize(
    ("probability", "label", "verdict"),
    [
        (0.0, NOT_MEME, NOT_MEME),
        (0.39, NOT_MEME, NOT_MEME),
        (0.45, NOT_MEME, NOT_SURE),
        (0.55, MEME, NOT_SURE),
        (0.65, MEME, MEME),
        (1.0, MEME, MEME),
    ],
)
def test_label_and_verdict_follow_threshold_and_band(
    probability: float, label: str, verdict: str, tiny_classifier: Classifier
) -> None:
    margin = tiny_classifier.temperature * math.log(max(probability, 1e-9) / max(1 - probability, 1e-9))
    (prediction,) = tiny_classifier.read_logits(torch.tensor([[margin, 0.0]]))
    assert prediction.meme_probability == pytest.approx(probability, abs=1e-6)
    assert (prediction.label, prediction.verdict) == (label, verdict)


def test_what_a_hair_decides_is_answered_in_full_precision(tiny_classifier: Classifier) -> None:
    """Where rounding moves probabilities by up to 0.01, every label and verdict is the exact one."""
    inputs = torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = tiny_classifier.answer(inputs)
    probabilities = sorted(prediction.meme_probability for prediction in expected)
    # Between two neighbours: another number of pictures in the batch may round the last digit differently.
    low, threshold, high = (sum(probabilities[at : at + 2]) / 2 for at in (50, 100, 150))
    thresholds = {"nearly_all": low, "balanced": threshold, "certain": high}
    exact = dataclasses.replace(tiny_classifier, threshold=threshold, not_sure=(low, high), thresholds=thresholds)
    rounded = tiny_classifier.network(inputs) + 0.02 * torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    rounding = dataclasses.replace(exact, exact=exact.network)

    assert (
        max(
            abs(a.meme_probability - b.meme_probability)
            for a, b in zip(exact.read_logits(rounded), expected, strict=True)
        )
        < ROUNDING
    )
    words = [(p.label, p.verdict) for p in exact.answer(inputs)]
    assert [(p.label, p.verdict) for p in exact.judge(inputs, rounded)] != words
    assert [(p.label, p.verdict) for p in rounding.judge(inputs, rounded)] == words


class Counted(torch.nn.Module):
    """Counts the pictures that a network computes."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network
        self.pictures = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.pictures += len(inputs)
        logits: torch.Tensor = self.network(inputs)
        return logits


@pytest.mark.parametrize(("rounding", "again"), [(0.02, 0), (0.07, 1)])
def test_a_coarse_network_keeps_no_probability_of_the_middle(
    rounding: float, again: int, tiny_classifier: Classifier
) -> None:
    """At 0.7, far from every threshold, 8 bits may be wrong by 0.07."""
    exact = Counted(tiny_classifier.network)
    coarse = dataclasses.replace(tiny_classifier, exact=exact, rounding=rounding)
    margins = [tiny_classifier.temperature * math.log(p / (1 - p)) for p in (0.05, 0.7, 0.99)]
    coarse.judge(torch.zeros(3, 3, 64, 64), torch.tensor([[margin, 0.0] for margin in margins]))
    assert exact.pictures == again


def test_the_order_of_the_outputs_is_the_checkpoints(tiny_classifier: Classifier) -> None:
    swapped = dataclasses.replace(tiny_classifier, classes=(NOT_MEME, MEME))
    logits = torch.tensor([[2.0, -1.0]])
    (ours,), (theirs,) = tiny_classifier.read_logits(logits), swapped.read_logits(logits)
    assert ours.label == MEME
    assert theirs.label == NOT_MEME
    assert ours.meme_probability == pytest.approx(1 - theirs.meme_probability, abs=1e-6)


def test_the_shipped_checkpoint_knows_the_examples(classifier: Classifier) -> None:
    names = {MEME: ("cat_meme", "choice_meme", "mountain_meme"), NOT_MEME: ("mountains", "bar_chart", "concert_poster")}
    for label in CLASSES:
        predictions = classifier.predict([open_picture(ROOT / "examples" / f"{name}.jpg") for name in names[label]])
        assert [prediction.label for prediction in predictions] == [label] * 3
