"""The checkpoint, the preprocessing and the prediction: everything between a picture and its label."""

import copy
import hashlib
import io
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.densenet import _DenseLayer
from torchvision.transforms.v2 import functional as F

from images import to_square

MEME, NOT_MEME, NOT_SURE = "meme", "not_meme", "not_sure"
CLASSES = (MEME, NOT_MEME)  # the order of the outputs of the networks trained here
STRICTNESS = ("nearly_all", "balanced", "certain")  # find nearly all memes … only the certain ones
ARCHITECTURE = "densenet121"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SHIFT = 0.05  # of a probability by a network that rounds more than bfloat16
ROUNDING = 0.015  # bounds how far bfloat16 moves a probability; on 4,127 test pictures, at most 0.008
CPU = torch.device("cpu")
DEFAULT_CHECKPOINT = Path(__file__).with_name("best_model.pth")
HOW_TO_GET_ONE = "Get best_model.pth from this project's repository, or make one with `python -m training.train`."


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be used; its text says in one sentence why and how to get a good one."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """From upright RGB pictures to the network's input.

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
        return self.normalise([to_square(picture, self.input_size)])[0]

    def normalise(self, squares: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Turn squares from `images.to_square` into one input of shape (N, 3, input_size, input_size), float32."""
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
        scaled = F.to_dtype(pixels, torch.float32, scale=True)
        normalised: Tensor = F.normalize(scaled, list(self.mean), list(self.std), inplace=True)
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
        network: DenseNet121 `for_inference`; (N, 3, S, S) -> (N, 2) logits.
        classes: `meme` and `not_meme` in the order of the network's outputs.
        preprocessing: what turns a picture into the network's input.
        temperature: divides the logits before the softmax (Guo et al. 2017, arXiv 1706.04599).
        threshold: a probability of meme from here on is labelled `meme`.
        not_sure: probabilities strictly between these two are answered `not_sure`.
        thresholds: for each of `STRICTNESS`, the probability from which on a picture counts as a meme.
        evidence_scales: for each of `gradcam.METHODS`, the evidence that a heatmap paints in its last colour.
        sha256: of the checkpoint file, in hexadecimal.
        about: the checkpoint's own figures and history, for people to read.
        exact: the same network in full precision, if `network` rounds; it decides close cases.
        rounding: by how much `network` moves a probability at most; closer to a threshold, a case is close.
    """

    network: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float
    threshold: float
    not_sure: tuple[float, float]
    thresholds: dict[str, float]
    evidence_scales: dict[str, float]
    sha256: str
    about: dict[str, Any] = field(repr=False)
    exact: nn.Module | None = None
    rounding: float = ROUNDING

    @classmethod
    def load(
        cls,
        path: str | Path = DEFAULT_CHECKPOINT,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
    ) -> Self:
        """Read a checkpoint that `save_checkpoint` wrote.

        Args:
            path: of the checkpoint.
            dtype: number format of the convolutions, if not `fastest_dtype(device)`.
            device: where the network runs. Inputs and predictions are on the CPU all the same.

        Raises:
            BadCheckpoint: if the file is missing, damaged, holds something else, or is not the one whose
                digest is recorded beside it.
        """
        path = Path(path)
        try:
            data, recorded = path.read_bytes(), digest_path(path)
            expected = recorded.read_text(errors="replace").split()[:1] if recorded.exists() else None
        except OSError as error:
            raise BadCheckpoint(f"The checkpoint {path.name} cannot be read. {HOW_TO_GET_ONE}") from error
        sha256 = hashlib.sha256(data).hexdigest()
        if expected not in (None, [sha256]):
            raise BadCheckpoint(
                f"The checkpoint {path.name} is not the one whose digest {recorded.name} records. {HOW_TO_GET_ONE}"
            )
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
            scales = {name: float(scale) for name, scale in checkpoint["evidence_scales"].items()}
            if min(scales.values()) <= 0:
                raise ValueError("a scale without length")
            classes = tuple(checkpoint["classes"])
            if checkpoint["architecture"] != ARCHITECTURE or set(classes) != set(CLASSES):
                raise ValueError("another architecture or other classes")
            # Checkpoints of the first edition have one threshold only.
            thresholds = checkpoint.get("thresholds") or dict.fromkeys(STRICTNESS, checkpoint["threshold"])
            network = build_network()
            network.load_state_dict(checkpoint["state_dict"], strict=True)
            dtype = dtype or fastest_dtype(device)
            if device.type == "cuda":  # else float32 convolutions are rounded to TensorFloat-32
                torch.backends.cudnn.allow_tf32 = False
            return cls(
                network=for_inference(network, dtype, device),
                exact=None if dtype == torch.float32 else for_inference(network, torch.float32, device),
                classes=classes,
                preprocessing=Preprocessing(
                    int(checkpoint["input_size"]), tuple(checkpoint["mean"]), tuple(checkpoint["std"])
                ),
                temperature=float(checkpoint["temperature"]),
                threshold=float(checkpoint["threshold"]),
                not_sure=(float(checkpoint["not_sure"][0]), float(checkpoint["not_sure"][1])),
                thresholds={name: float(thresholds[name]) for name in STRICTNESS},
                evidence_scales=scales,
                sha256=sha256,
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
        return self.answer(self.preprocess(pictures))

    def answer(self, inputs: Tensor) -> list[Prediction]:
        """Label preprocessed pictures of shape (N, 3, S, S)."""
        with torch.inference_mode():
            return self.judge(inputs, self.network(inputs))

    def preprocess(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Stack pictures into one input of shape (N, 3, S, S)."""
        return self.preprocessing.normalise([to_square(p, self.preprocessing.input_size) for p in pictures])

    def judge(self, inputs: Tensor, logits: Tensor) -> list[Prediction]:
        """Turn logits into predictions, and compute close cases again in full precision.

        So labels and verdicts do not depend on the processor or on the number format.

        Args:
            inputs: shape (N, 3, S, S).
            logits: shape (N, 2).
        """
        predictions = self.read_logits(logits)
        if self.exact is None:
            return predictions
        close = [index for index, prediction in enumerate(predictions) if self._is_close(prediction.meme_probability)]
        if close:
            with torch.inference_mode():
                again = self.read_logits(self.exact(inputs[close]))
            for index, prediction in zip(close, again, strict=True):
                predictions[index] = prediction
        return predictions

    def _is_close(self, probability: float) -> bool:
        """Whether rounding could change a label or verdict, or move the probability by more than `MAX_SHIFT`."""
        edges = (*self.thresholds.values(), *self.not_sure)
        if min(abs(probability - edge) for edge in edges) < self.rounding:
            return True
        # An error of the logits moves a probability most in the middle of the scale.
        return self.rounding > MAX_SHIFT and min(edges) < probability < max(edges)

    def read_logits(self, logits: Tensor) -> list[Prediction]:
        """Turn logits of shape (N, 2) into predictions."""
        probabilities = (logits.cpu() / self.temperature).softmax(1)[:, self.classes.index(MEME)]  # (N,)
        return [self._judge(probability) for probability in probabilities.tolist()]

    def _judge(self, probability: float) -> Prediction:
        label = MEME if probability >= self.threshold else NOT_MEME
        low, high = self.not_sure
        return Prediction(label, probability, NOT_SURE if low < probability < high else label)


def build_network(outputs: int = len(CLASSES)) -> nn.Sequential:
    """Torchvision's DenseNet121, untrained."""
    return as_stages(torchvision.models.densenet121(num_classes=outputs))


def as_stages(densenet: torchvision.models.DenseNet) -> nn.Sequential:
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


class _Cast(nn.Module):
    """A change of device, number format and memory layout between two stages."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.device = device

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.device, self.dtype, memory_format=torch.channels_last)


def fastest_dtype(device: torch.device = CPU) -> torch.dtype:
    """Bfloat16 where the device multiplies it in hardware, else full precision."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    able = torch.cpu.get_capabilities()  # of other kinds of processors, none was measured
    in_hardware = torch.backends.mkldnn.is_available() and (able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.bfloat16 if in_hardware else torch.float32


def for_inference(network: nn.Module, dtype: torch.dtype | None = None, device: torch.device = CPU) -> nn.Module:
    """A frozen copy of a network from `as_stages` that gives the same answers faster.

    Each BatchNorm that follows a convolution is folded into it, the memory format is channels-last,
    and everything up to the last feature map is computed in the given number format.

    Args:
        network: trained; it is not changed.
        dtype: number format of the convolutions, if not `fastest_dtype(device)`.
        device: where it runs. It takes inputs from any device.
    """
    dtype = dtype or fastest_dtype(device)
    fast = copy.deepcopy(network).eval()
    features: OrderedDict[str, Any] = OrderedDict(fast.get_submodule("features").named_children())
    features["conv0"] = fuse_conv_bn_eval(features["conv0"], features.pop("norm0"))
    for layer in fast.modules():
        if isinstance(layer, _DenseLayer):
            layer.conv1, layer.norm2 = fuse_conv_bn_eval(layer.conv1, layer.norm2), nn.Identity()
    last = features.pop("norm5")  # stays in full precision: the evidence adds up to the logits
    convolutions = nn.Sequential(features).to(dtype).to(memory_format=torch.channels_last)
    stages = OrderedDict(cast=_Cast(dtype, device), **OrderedDict(convolutions.named_children()))
    fast.features = nn.Sequential(stages | {"uncast": _Cast(torch.float32, device), "norm5": last})
    return fast.eval().requires_grad_(False).to(device)


def save_checkpoint(
    path: Path,
    network: nn.Module,
    preprocessing: Preprocessing,
    *,
    temperature: float,
    threshold: float,
    not_sure: tuple[float, float],
    thresholds: dict[str, float],
    evidence_scales: dict[str, float],
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
        "thresholds": thresholds,
        "evidence_scales": evidence_scales,
        "about": about,
    }
    write_checkpoint(checkpoint, path)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, and beside it its digest, as `sha256sum --check` reads it."""
    save_atomically(checkpoint, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    digest_path(path).write_text(f"{sha256}  {path.name}\n", encoding="ascii")


def digest_path(path: Path) -> Path:
    """Where the SHA-256 of a checkpoint is recorded."""
    return path.with_name(path.name + ".sha256")


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Save for `torch.load`, whole or not at all: an interruption leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    digest_path(path).unlink(missing_ok=True)  # of what was there before
    partial.replace(path)
