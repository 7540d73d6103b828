"""The checkpoint, the preprocessing and the prediction: everything between a picture and its label."""

import hashlib
import io
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

MEME, NOT_MEME, NOT_SURE = "meme", "not_meme", "not_sure"
CLASSES = (MEME, NOT_MEME)  # the order of the outputs of the networks trained here
ARCHITECTURE = "densenet121"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DEFAULT_CHECKPOINT = Path(__file__).with_name("best_model.pth")
HOW_TO_GET_ONE = "Get best_model.pth from this project's repository, or make one with train.py."


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be used; its text says in one sentence why and how to get a good one."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From an upright RGB picture to the network's input.

    The whole picture is squashed onto a square. Memes carry their captions at the edges, which a
    centre crop cuts off; letterboxing would keep the proportions, but spends a third of the input
    on padding for a 3:2 photo and looks like the white bar above a captioned picture.

    Attributes:
        input_size: side of the square input, in pixels.
        mean: of each RGB channel, on a scale from 0 to 1.
        std: likewise.
    """

    input_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, picture: Image.Image) -> Tensor:
        """Give the normalised input of shape (3, input_size, input_size), float32."""
        square = picture.resize((self.input_size, self.input_size), Image.Resampling.BILINEAR, reducing_gap=3.0)
        pixels: Tensor = F.to_dtype(F.pil_to_tensor(square), torch.float32, scale=True)
        normalised: Tensor = F.normalize(pixels, list(self.mean), list(self.std))
        return normalised


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the classifier says of one picture.

    Attributes:
        label: `meme` or `not_meme`, whichever side of the threshold the probability is on.
        meme_probability: calibrated, from 0 to 1.
        verdict: the label, or `not_sure` inside the checkpoint's band of doubt.
    """

    label: str
    meme_probability: float
    verdict: str


@dataclass(frozen=True, slots=True)
class Classifier:
    """One checkpoint, ready to answer. Nothing writes to it after loading, so threads may share it.

    Attributes:
        network: DenseNet121 in evaluation mode, parameters frozen; (N, 3, S, S) -> (N, 2) logits.
        classes: `meme` and `not_meme` in the order of the network's outputs.
        preprocessing: what turns a picture into the network's input.
        temperature: divides the logits before the softmax (Guo et al. 2017, arXiv 1706.04599).
        threshold: a probability of meme from here on is labelled `meme`.
        not_sure: probabilities strictly between these two are answered `not_sure`.
        evidence_scale: logit evidence that the heatmap paints in full red.
        sha256: of the checkpoint file, in hexadecimal.
        about: the checkpoint's own figures and history, for people to read.
    """

    network: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float
    threshold: float
    not_sure: tuple[float, float]
    evidence_scale: float
    sha256: str
    about: dict[str, Any] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path = DEFAULT_CHECKPOINT) -> Self:
        """Read a checkpoint that `save_checkpoint` wrote.

        Raises:
            BadCheckpoint: if the file is missing, damaged, or holds something else.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadCheckpoint(f"The checkpoint {path.name} cannot be read. {HOW_TO_GET_ONE}") from error
        try:
            # PyTorch does not compare the checksums of the archive that it reads.
            if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():
                raise ValueError(f"{damaged} is damaged")
            # weights_only: a pickle from a stranger could otherwise run any code.
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # readers fed with hostile bytes raise nearly anything
            raise BadCheckpoint(
                f"The checkpoint {path.name} is damaged or is not a PyTorch file. {HOW_TO_GET_ONE}"
            ) from error
        try:
            classes = tuple(checkpoint["classes"])
            if checkpoint["architecture"] != ARCHITECTURE or set(classes) != set(CLASSES):
                raise ValueError("another architecture or other classes")
            network = build_network()
            network.load_state_dict(checkpoint["state_dict"], strict=True)
            return cls(
                network=network.eval().requires_grad_(False),
                classes=classes,
                preprocessing=Preprocessing(
                    int(checkpoint["input_size"]), tuple(checkpoint["mean"]), tuple(checkpoint["std"])
                ),
                temperature=float(checkpoint["temperature"]),
                threshold=float(checkpoint["threshold"]),
                not_sure=(float(checkpoint["not_sure"][0]), float(checkpoint["not_sure"][1])),
                evidence_scale=float(checkpoint["evidence_scale"]),
                sha256=hashlib.sha256(data).hexdigest(),
                about=dict(checkpoint["about"]),
            )
        except Exception as error:  # a foreign dictionary may hold anything under these names
            raise BadCheckpoint(
                f"The checkpoint {path.name} is not one of this meme classifier's. {HOW_TO_GET_ONE}"
            ) from error

    def predict(self, pictures: Sequence[Image.Image]) -> list[Prediction]:
        """Label upright RGB pictures, in their order."""
        if not pictures:
            return []
        with torch.inference_mode():
            logits = self.network(self.preprocess(pictures))  # (N, 2)
        return self.read_logits(logits)

    def preprocess(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Stack pictures into one input of shape (N, 3, S, S)."""
        return torch.stack([self.preprocessing(picture) for picture in pictures])

    def read_logits(self, logits: Tensor) -> list[Prediction]:
        """Turn logits of shape (N, 2) into predictions."""
        probabilities = (logits / self.temperature).softmax(1)[:, self.classes.index(MEME)]  # (N,)
        return [self._judge(probability) for probability in probabilities.tolist()]

    def _judge(self, probability: float) -> Prediction:
        label = MEME if probability >= self.threshold else NOT_MEME
        low, high = self.not_sure
        return Prediction(label, probability, NOT_SURE if low < probability < high else label)


def build_network() -> nn.Sequential:
    """Torchvision's DenseNet121 with two outputs, untrained."""
    return in_stages(torchvision.models.densenet121(num_classes=len(CLASSES)))


def in_stages(densenet: torchvision.models.DenseNet) -> nn.Sequential:
    """The same network, its weights under the same names, as a chain of modules.

    Torchvision's own forward ends in an in-place ReLU, which overwrites the very feature map that
    Grad-CAM reads. Here that ReLU is a module of its own; the logits are the same.
    """
    return nn.Sequential(
        OrderedDict(
            features=densenet.features,  # (N, 3, S, S) -> (N, 1024, S/32, S/32)
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),  # -> (N, 1024, 1, 1)
            flatten=nn.Flatten(),
            classifier=densenet.classifier,  # -> (N, 2)
        )
    )


def save_checkpoint(
    path: Path,
    network: nn.Module,
    preprocessing: Preprocessing,
    *,
    temperature: float,
    threshold: float,
    not_sure: tuple[float, float],
    evidence_scale: float,
    about: dict[str, Any],
) -> None:
    """Write a checkpoint that `Classifier.load` reads; weights in half precision, whole or not at all."""
    state = network.state_dict()
    checkpoint = {
        "architecture": ARCHITECTURE,
        "classes": CLASSES,
        "state_dict": {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
        "input_size": preprocessing.input_size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "temperature": temperature,
        "threshold": threshold,
        "not_sure": not_sure,
        "evidence_scale": evidence_scale,
        "about": about,
    }
    save_whole(checkpoint, path)


def save_whole(content: dict[str, Any], path: Path) -> None:
    """Save for `torch.load`, whole or not at all: an interruption leaves what was there before."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)
