"""Where the network runs: on how many cores, on which device, and with OpenVINO if it is installed."""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from images import BadImage, open_picture, to_square
from model import DEFAULT_CHECKPOINT, ROUNDING, Classifier, fastest_dtype

TORCH, OPENVINO = "PyTorch", "OpenVINO"
AUTO, INT8, BF16, FP32 = "auto", "int8", "bf16", "fp32"
PRECISIONS = (AUTO, INT8, BF16, FP32)
DTYPES = {BF16: torch.bfloat16, FP32: torch.float32}
DEVICES = (AUTO, "cpu", "cuda", "mps", "xpu")
PROC = Path("/proc/self")  # proc(5); only Linux has it
BATCH = 16  # pictures that one core classifies at once
LARGEST_BATCH = 64  # one thread decodes a whole batch, so larger ones only delay the first answer
BYTES_PER_PICTURE = 64 * 2**20  # of device memory; a generous bound for DenseNet121 at 224 pixels in float32

Square = NDArray[np.uint8]
Answer = TypeVar("Answer")
Item = TypeVar("Item")
Result = TypeVar("Result")


class BadEngine(ValueError):
    """A device or precision that cannot be used here. The text says why in one sentence."""


class BadConversion(ValueError):
    """A converted network that cannot be used. The text says why in one sentence."""


class OpenVINONetwork(nn.Module):
    """A network compiled by OpenVINO: the same outputs, no gradients. Threads may share it."""

    def __init__(self, compiled: Any, source: nn.Module, precision: str) -> None:
        super().__init__()
        self.compiled = compiled
        self.source = source  # its weights identify the network: training compares them before it resumes
        self.precision = precision
        self.request = threading.local()  # a request overwrites its last output, so each thread has its own

    def forward(self, inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, 3, S, S) -> the network's output or outputs, on the CPU."""
        if not hasattr(self.request, "own"):
            self.request.own = self.compiled.create_infer_request()
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
    """OpenVINO if it is installed, else PyTorch."""
    return OPENVINO if find_spec("openvino") else TORCH


def find_device(name: str = AUTO) -> torch.device:
    """The device of that name; for `auto` an accelerator if there is one, else the CPU.

    Raises:
        BadEngine: if this computer has no such device, or this PyTorch cannot use it.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    accelerator = found.type if found and found.type in DEVICES else None
    if name == AUTO:
        return torch.device(accelerator or "cpu")
    if name not in DEVICES:
        raise BadEngine(f"The device {name} is unknown; it must be one of {', '.join(DEVICES)}.")
    if name not in ("cpu", accelerator):
        raise BadEngine(f"This computer has no {name} device that this PyTorch can use; try --device auto.")
    return torch.device(name)


def device_of(network: nn.Module) -> torch.device:
    """The device that a network's weights are on."""
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def batch_size(device: torch.device) -> int:
    """How many pictures to classify at once on a device, by its free memory."""
    if device.type == "cpu":
        return BATCH
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except (RuntimeError, NotImplementedError, AttributeError):  # not every backend reports its memory
        return BATCH
    return max(1, min(LARGEST_BATCH, free // 2 // BYTES_PER_PICTURE))


def answer_in_parts(answer: Callable[[Tensor], Sequence[Answer]], inputs: Tensor) -> list[Answer]:
    """Answer a batch, in halves where the device's memory is too small for all of it.

    Args:
        answer: from inputs of shape (N, 3, S, S) to N answers.
        inputs: shape (N, 3, S, S).

    Raises:
        BadEngine: if the memory is too small for a single picture.
    """
    try:
        return list(answer(inputs))
    except RuntimeError as error:  # MPS has no type of its own for it
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
        if len(inputs) == 1:
            raise BadEngine("The device has too little free memory for one picture; try --device cpu.") from error
    # Outside of `except`, which would keep the failed attempt's tensors alive.
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    half = len(inputs) // 2
    return answer_in_parts(answer, inputs[:half]) + answer_in_parts(answer, inputs[half:])


def classify_batches(
    classifier: Classifier, paths: list[Path], answer: Callable[[Tensor], Sequence[Answer]]
) -> Iterator[tuple[Path, Answer | BadImage]]:
    """Yield each path, in order, with what `answer` returns for its picture or why there is nothing.

    Each thread opens one batch and runs the network on it, on one core. So all cores are busy, nothing is sent
    between processes, and no core waits for another that has part of the same batch. Pillow, PyTorch and OpenVINO
    release Python's lock meanwhile. One more thread than cores, because threads also wait for the disk.
    """

    def answered(batch: Sequence[Path]) -> list[Answer | BadImage]:
        squares = [load_square(path, classifier.preprocessing.input_size) for path in batch]
        good = [square for square in squares if not isinstance(square, BadImage)]
        with one_at_a_time:
            answers = iter(answer_in_parts(answer, classifier.preprocessing.normalise(good)) if good else [])
        return [square if isinstance(square, BadImage) else next(answers) for square in squares]

    threads = usable_cores() + 1
    device = device_of(classifier.network)
    # An accelerator takes one batch at a time, while the other threads decode the next ones.
    one_at_a_time = nullcontext() if device.type == "cpu" else Lock()
    size = batch_size(device)
    batches = (paths[start : start + size] for start in range(0, len(paths), size))
    todo = iter(paths)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for answers in map_in_order(pool, answered, batches, ahead=2 * threads):
            for one in answers:
                yield next(todo), one


def load_square(path: Path, side: int) -> Square | BadImage:
    """The network's input from the picture at a path, of shape (side, side, 3), or why there is none.

    If only a part of the picture could be used, a sentence on standard error says so.
    """
    try:
        picture = open_picture(path)
    except BadImage as error:
        return error
    if warning := picture.info["warning"]:
        tqdm.write(f"{path}: {warning}", file=sys.stderr)
    return to_square(picture, side)


def map_in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Do some work on every item in a pool's threads, and yield the results in the order of the items.

    Args:
        pool: does the work.
        work: called once for each item.
        items: any number; no more are taken than are needed.
        ahead: how many results may be under way or waiting beyond the next one.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after Ctrl-C, nothing more begins
        for result in waiting:
            result.cancel()


def convert_network(network: nn.Module, input_size: int) -> Any:
    """Convert a network to OpenVINO's format, in full precision, for inputs of shape (N, 3, input_size, input_size)."""
    import openvino  # noqa: PLC0415  (optional)

    example = torch.zeros(2, 3, input_size, input_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates the tracing that OpenVINO is built on
        # OpenVINO would trace it, too, but then checks the trace, which takes seconds.
        traced = torch.jit.trace(network.eval(), example, check_trace=False)
        return openvino.convert_model(traced, input=[([-1, *example.shape[1:]], openvino.Type.f32)])


def compile_converted(converted: Any, source: nn.Module, precision: str, at_once: int = 1) -> OpenVINONetwork:
    """Compile a converted network for this processor.

    Args:
        converted: from `convert_network` or `read_converted`.
        source: the network that it was converted from.
        precision: one of `INT8`, `BF16`, `FP32`; a quantised network runs in 8 bits whatever is said here.
        at_once: how many threads will call it at the same time; they share the cores.
    """
    # What is not quantised in an 8-bit network (5 % of its time) stays in full precision: its error was measured so.
    hint = "bf16" if precision == BF16 else "f32"
    settings = {"NUM_STREAMS": at_once, "INFERENCE_PRECISION_HINT": hint}
    return OpenVINONetwork(openvino_core().compile_model(converted, "CPU", settings), source, precision)


@cache
def openvino_core() -> Any:
    """The one OpenVINO Core of this process.

    Each Core moves the alternate signal stack of the thread that makes it, and frees that memory at its end. After
    several, the next signal, such as Ctrl-C, can find no stack and crashes the process.
    """
    import openvino  # noqa: PLC0415

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})  # else the process crashes if another one cuts a network's file
    return core


def native_precision() -> str:
    """What OpenVINO computes fastest in without quantisation: bfloat16 where the processor has it."""
    return BF16 if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else FP32


def compile_network(network: nn.Module, input_size: int, at_once: int = 1) -> OpenVINONetwork:
    """Convert and compile a network for inputs of one size, in this processor's fastest precision.

    Args:
        network: what to compile.
        input_size: pixels.
        at_once: how many threads will call it at the same time; they share the cores.
    """
    return compile_converted(convert_network(network, input_size), network, native_precision(), at_once)


def quantized_path(checkpoint: Path) -> Path:
    """Where `training.quantize` writes the 8-bit network of a checkpoint; its weights are in the .bin beside it."""
    return checkpoint.with_suffix(".int8.xml")


def save_converted(converted: Any, path: Path, checkpoint_sha256: str, max_shift: float = 0.0) -> None:
    """Write a converted network as .xml and .bin, with what `read_converted` checks.

    Args:
        converted: the network.
        path: of the .xml file.
        checkpoint_sha256: digest of the checkpoint that it was made from.
        max_shift: how far its probabilities were from the checkpoint's at most, on pictures not used to make it.
    """
    import openvino  # noqa: PLC0415

    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".converted-") as folder:
        partial = Path(folder, path.name)
        weights = partial.with_suffix(".bin")
        openvino.save_model(converted, partial, compress_to_fp16=False)
        about = {"checkpoint_sha256": checkpoint_sha256, "max_shift": repr(max_shift)}
        for name, value in (about | {"weights_sha256": sha256(weights)}).items():
            converted.set_rt_info(value, ["meme_classifier", name])
        openvino.save_model(converted, partial, compress_to_fp16=False)
        weights.replace(path.with_suffix(".bin"))  # first: an .xml with other weights is refused
        partial.replace(path)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_converted(path: Path, checkpoint_sha256: str) -> tuple[Any, float]:
    """Read what `save_converted` wrote.

    Returns:
        The converted network, and the largest shift of its probabilities.

    Raises:
        BadConversion: if the files are missing, damaged or made from another checkpoint.
    """
    try:
        content = path.read_text(encoding="utf-8")
        about = {
            name: re.findall(rf'<{name} value="([^"]*)"', content)[0]
            for name in ("checkpoint_sha256", "max_shift", "weights_sha256")
        }
        max_shift = float(about["max_shift"])
        damaged = about["weights_sha256"] != sha256(path.with_suffix(".bin")) or not 0 <= max_shift <= 1
        converted = None if damaged else openvino_core().read_model(path)  # damaged weights may crash it
    except FileNotFoundError as error:
        raise BadConversion(f"There is no {path.name}.") from error
    except Exception as error:  # OpenVINO raises RuntimeError, and others, for what it cannot read
        raise BadConversion(f"{path.name} is damaged.") from error
    if about["checkpoint_sha256"] != checkpoint_sha256:
        raise BadConversion(f"{path.name} was made from another checkpoint.")
    if converted is None:
        raise BadConversion(f"{path.name} is damaged.")
    return converted, max_shift


def load_fastest(checkpoint: Path, precision: str = AUTO, device: str = "cpu") -> Classifier:
    """Read a checkpoint for the fastest engine; for labels only, because OpenVINO gives no heatmaps.

    Args:
        checkpoint: path of the checkpoint.
        precision: one of `PRECISIONS`. With `auto`, all engines and precisions that are possible on this processor
            are measured once, and the fastest one is used from then on.
        device: one of `DEVICES`.

    Raises:
        BadCheckpoint: as `Classifier.load` does.
        BadEngine: if the device or the precision cannot be used here.
    """
    if find_device(device).type != "cpu" or best_engine() == TORCH:
        return load_with_torch(checkpoint, precision, device)
    if precision == AUTO:
        return load_measured(checkpoint)
    if precision == BF16 and native_precision() != BF16:
        raise BadEngine("This processor does not multiply bfloat16; use --precision int8, fp32 or auto.")
    return load_with_openvino(Classifier.load(checkpoint, torch.float32), checkpoint, precision)


def load_with_openvino(classifier: Classifier, checkpoint: Path, precision: str) -> Classifier:
    """Compile a classifier's network with OpenVINO, for as many threads as there are cores.

    Args:
        classifier: in full precision, on PyTorch. It computes close cases again.
        checkpoint: the path that it was read from; the 8-bit network lies beside it.
        precision: one of `INT8`, `BF16`, `FP32`.

    Raises:
        BadEngine: if there is no 8-bit network of this checkpoint.
    """
    if precision == INT8:
        try:
            converted, max_shift = read_converted(quantized_path(checkpoint), classifier.sha256)
        except BadConversion as error:
            raise BadEngine(f"{error} Make it with `python -m training.quantize`.") from error
    else:
        converted, max_shift = convert_once(classifier), 0.0
    return replace_network(classifier, converted, precision, max_shift)


def replace_network(classifier: Classifier, converted: Any, precision: str, max_shift: float) -> Classifier:
    """A classifier on OpenVINO, from one in full precision and its converted network.

    Args:
        classifier: computes close cases again.
        converted: its network in OpenVINO's format.
        precision: one of `INT8`, `BF16`, `FP32`.
        max_shift: how far the converted network's probabilities are from the checkpoint's at most.
    """
    return dataclasses.replace(
        classifier,
        network=compile_converted(converted, classifier.network, precision, usable_cores()),
        exact=classifier.network,
        rounding=max(ROUNDING, max_shift),
    )


def load_measured(checkpoint: Path) -> Classifier:
    """Read a checkpoint for the fastest of PyTorch and OpenVINO's precisions.

    The first time on a processor, each is measured, and a line says how long each took. The measurement is kept in
    `cache_folder`.

    Raises:
        BadCheckpoint: as `Classifier.load` does.
    """
    exact = Classifier.load(checkpoint, torch.float32)
    native = BF16 if fastest_dtype() == torch.bfloat16 else FP32
    candidates: dict[str, Callable[[], Classifier]] = {f"{TORCH} {native}": partial(Classifier.load, checkpoint)}
    for precision in {FP32, native_precision()}:
        candidates[f"{OPENVINO} {precision}"] = partial(load_with_openvino, exact, checkpoint, precision)
    try:
        quantized, max_shift = read_converted(quantized_path(checkpoint), exact.sha256)
        candidates[f"{OPENVINO} {INT8}"] = partial(replace_network, exact, quantized, INT8, max_shift)
    except BadConversion as error:
        if quantized_path(checkpoint).exists():
            print(f"{error} It is not used.", file=sys.stderr)
    measurement = measurement_path(exact.sha256)
    with suppress(OSError, ValueError, AttributeError, TypeError):
        milliseconds = json.loads(measurement.read_text())
        if milliseconds.keys() == candidates.keys():
            return candidates[min(milliseconds, key=milliseconds.__getitem__)]()
    loaded = {name: load() for name, load in candidates.items()}
    networks = {name: classifier.network for name, classifier in loaded.items()}
    milliseconds = milliseconds_per_picture(networks, exact.preprocessing.input_size)
    figures = ", ".join(f"{name} {taken:.0f} ms" for name, taken in sorted(milliseconds.items(), key=lambda m: m[1]))
    print(f"Measured once on this processor, time for a picture: {figures}", file=sys.stderr)
    with suppress(OSError):
        measurement.parent.mkdir(parents=True, exist_ok=True)
        measurement.write_text(json.dumps(milliseconds))
    return loaded[min(milliseconds, key=milliseconds.__getitem__)]


def load_for_page() -> Classifier:
    """Read the shipped checkpoint for a server: on the CPU, or on the device in the variable `MEME_DEVICE`.

    Raises:
        BadCheckpoint: as `Classifier.load` does.
        BadEngine: if there is no such device.
    """
    device = os.environ.get("MEME_DEVICE")
    return load_with_torch(DEFAULT_CHECKPOINT, device=device) if device else Classifier.load()


def load_with_torch(checkpoint: Path, precision: str = AUTO, device: str = "cpu") -> Classifier:
    """Like `load_fastest`, but always with PyTorch, so that heatmaps are possible."""
    where = find_device(device)
    if precision == INT8:
        raise BadEngine(
            "--precision int8 needs OpenVINO (pip install -r requirements-fast.txt) and --device cpu, and gives no "
            "heatmaps."
        )
    if precision == BF16 and fastest_dtype(where) != torch.bfloat16:
        raise BadEngine("This device does not multiply bfloat16; use --precision fp32 or auto.")
    return Classifier.load(checkpoint, DTYPES.get(precision), where)


def describe_engine(network: nn.Module) -> str:
    """Engine, device and precision of a network, for people to read."""
    if isinstance(network, OpenVINONetwork):
        return f"{OPENVINO} on cpu, {network.precision}"
    parameter = next(network.parameters())
    return f"{TORCH} on {parameter.device.type}, {BF16 if parameter.dtype == torch.bfloat16 else FP32}"


def cache_folder() -> Path:
    """This user's folder for what can be made again."""
    from platformdirs import user_cache_path  # noqa: PLC0415  (in requirements-fast.txt)

    return user_cache_path("meme-classifier", appauthor=False)


def convert_once(classifier: Classifier) -> Any:
    """Convert a classifier's network, or read what an earlier process converted: that takes a tenth of the time."""
    path = cache_folder() / f"{classifier.sha256}-{version('openvino')}.xml"
    with suppress(BadConversion):
        return read_converted(path, classifier.sha256)[0]
    converted = convert_network(classifier.network, classifier.preprocessing.input_size)
    with suppress(OSError, RuntimeError):  # a home that cannot be written: each start converts
        save_converted(converted, path, classifier.sha256)
    return converted


def measurement_path(checkpoint_sha256: str) -> Path:
    """Where the measurement of a checkpoint's network is kept: another one for each processor and version."""
    core = openvino_core()
    processor = [core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
    key = repr((checkpoint_sha256, version("openvino"), torch.__version__, processor))
    return cache_folder() / f"speed-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def milliseconds_per_picture(networks: Mapping[str, nn.Module], input_size: int, rounds: int = 3) -> dict[str, float]:
    """Time networks in turns on noise, on one core each, as `classify_batches` runs them.

    The processor time of the best round counts, because other programs only ever add time.

    Args:
        networks: by name.
        input_size: pixels.
        rounds: how many times each is timed.

    Returns:
        Milliseconds of processor time for one picture, by name.
    """
    inputs = torch.randn(4, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))

    def measure() -> dict[str, float]:
        taken = {name: list[float]() for name in networks}
        with torch.inference_mode():
            for _ in range(rounds + 1):  # the first round warms up
                for name, network in networks.items():
                    started = time.process_time()
                    network(inputs)
                    taken[name].append(time.process_time() - started)
        return {name: min(seconds[1:]) * 1000 / len(inputs) for name, seconds in taken.items()}

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(measure).result()
