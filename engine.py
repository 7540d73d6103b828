"""The same answers sooner, where OpenVINO is installed: pip install -r requirements-fast.txt"""

import dataclasses
import os
import threading
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import Classifier

TORCH, OPENVINO = "PyTorch", "OpenVINO"


class OpenVINONetwork(nn.Module):
    """A compiled network, which gives what the network gives, without gradients. Threads may share it."""

    def __init__(self, network: Any, source: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.source = source  # whose weights tell it from others: train.py looks at them before it goes on
        self.request = threading.local()  # writes every answer to the same memory, so each thread has its own

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, 3, S, S) -> its output, or its outputs, on the CPU."""
        if not hasattr(self.request, "own"):
            self.request.own = self.network.create_infer_request()
        outputs = self.request.own.infer(inputs.numpy())
        first, *others = (torch.from_numpy(output.copy()) for output in outputs.values())
        return (first, *others) if others else first


def best_engine() -> str:
    """The fastest engine that is installed."""
    return OPENVINO if find_spec("openvino") else TORCH


def compile_network(network: nn.Module, input_size: int, at_once: int = 1) -> nn.Module:
    """Compile a network in full precision for inputs of one size; in bfloat16 where the processor has it.

    Args:
        network: what to compile.
        input_size: pixels.
        at_once: how many threads will ask at the same time; they share the cores.
    """
    import openvino  # noqa: PLC0415  (it is not required)

    example = torch.zeros(2, 3, input_size, input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch calls OpenVINO's way in old
        # OpenVINO would trace it, too, but then checks the trace, which takes seconds.
        traced = torch.jit.trace(network.eval(), example, check_trace=False)
        converted = openvino.convert_model(traced, input=[([-1, *example.shape[1:]], openvino.Type.f32)])
    core = openvino.Core()
    able = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {"NUM_STREAMS": at_once, "INFERENCE_PRECISION_HINT": "bf16" if able else "f32"}
    return OpenVINONetwork(core.compile_model(converted, "CPU", settings), network)


def load_fastest(checkpoint: Path) -> Classifier:
    """Read a checkpoint for the fastest engine; for labels only: heatmaps need what `Classifier.load` gives."""
    if best_engine() == TORCH:
        return Classifier.load(checkpoint)
    classifier = Classifier.load(checkpoint, torch.float32)
    network = compile_network(classifier.network, classifier.preprocessing.input_size, at_once=os.cpu_count() or 1)
    return dataclasses.replace(classifier, network=network, exact=classifier.network)
