"""The same answers sooner, where OpenVINO is installed: pip install -r requirements-fast.txt"""

import dataclasses
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import Classifier

TORCH, OPENVINO = "PyTorch", "OpenVINO"


class Compiled(nn.Module):
    """A compiled network, which gives what the network gives, without gradients. Not for two threads at once."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, 3, S, S) -> its output, or its outputs, on the CPU."""
        first, *others = (torch.from_numpy(output.copy()) for output in self.network(inputs.numpy()).values())
        return (first, *others) if others else first


def engine() -> str:
    """The fastest engine that is installed."""
    return OPENVINO if find_spec("openvino") else TORCH


def compiled(network: nn.Module, input_size: int) -> nn.Module:
    """Compile a network in full precision for inputs of one size; in bfloat16 where the processor has it."""
    import openvino  # noqa: PLC0415  (it is not required)

    example = torch.zeros(2, 3, input_size, input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch calls OpenVINO's way in old
        converted = openvino.convert_model(network.eval(), input=[-1, *example.shape[1:]], example_input=example)
    core = openvino.Core()
    able = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "bf16" if able else "f32"}
    return Compiled(core.compile_model(converted, "CPU", settings))


def load_fastest(checkpoint: Path) -> Classifier:
    """Read a checkpoint for the fastest engine; for labels only: heatmaps need what `Classifier.load` gives."""
    if engine() == TORCH:
        return Classifier.load(checkpoint)
    classifier = Classifier.load(checkpoint, torch.float32)
    network = compiled(classifier.network, classifier.preprocessing.input_size)
    return dataclasses.replace(classifier, network=network)
