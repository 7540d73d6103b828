"""Where the network runs: on how many cores, and with OpenVINO if it is installed (requirements-fast.txt)."""

import dataclasses
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from model import Classifier

TORCH, OPENVINO = "PyTorch", "OpenVINO"
PROC = Path("/proc/self")  # proc(5); only Linux has it


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


def usable_cores() -> int:
    """Count the cores that this process may use, by its CPU affinity and the CPU quota of its container.

    `os.cpu_count` counts the cores of the host. A fractional quota is rounded up, or part of it could not be used.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, math.ceil(quota)) for quota in _cpu_quotas())])


def _cpu_quotas() -> Iterator[float]:
    """The quotas of this process's control groups in cores; each group also limits the groups inside it."""
    for group in _control_groups("cpu"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            if (group / "cpu.max").exists():  # version 2
                quota, period = map(int, (group / "cpu.max").read_text().split())
            else:
                quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0 and period > 0:  # version 1 has -1 for no quota
                yield quota / period


def memory_limit() -> float:
    """The bytes of memory that this process may use: the machine's, or the limit of its container if that is lower.

    Returns:
        Bytes; infinite on systems that tell neither.
    """
    limits = [math.inf]
    with suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for group in _control_groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2 and 1
            with suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((group / name).read_text()))
    return min(limits)


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups that this process is in, from the outermost one visible to its own.

    Version 2 has one hierarchy for all controllers, version 1 one for each, and a system can have both (cgroups(7)).
    A container often sees its own group as the outermost.
    """
    try:
        memberships = [line.split(":", 2) for line in (PROC / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (PROC / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    own = {name: path for _, names, path in memberships for name in names.split(",")}  # version 2 has an empty name
    for place, kind in mounts:
        root, mount_point = place.split()[3:5]
        file_system, _, options = kind.split(" ", 2)
        name = {"cgroup2": "", "cgroup": controller}.get(file_system)
        if name not in own or (name and name not in options.split(",")):
            continue
        group = Path(mount_point)
        yield group
        with suppress(ValueError):  # the mount shows another part of the hierarchy
            for part in PurePosixPath(own[name]).relative_to(root).parts:
                group /= part
                yield group


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
    network = compile_network(classifier.network, classifier.preprocessing.input_size, at_once=usable_cores())
    return dataclasses.replace(classifier, network=network, exact=classifier.network)
