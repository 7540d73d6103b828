import copy
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import ROOT, noise
from tiny import build_tiny_network
from torch import Tensor, nn

import classify
import engine
import model
from engine import AUTO, BATCH, BF16, FP32, INT8, BadConversion, BadEngine, OpenVINONetwork
from images import BadImage, find_pictures, open_picture
from model import DEFAULT_CHECKPOINT, ROUNDING, Classifier, Prediction

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
ENGINES = ("PyTorch on cpu, bf16", "OpenVINO on cpu, fp32", "OpenVINO on cpu, bf16", "OpenVINO on cpu, int8")
INPUTS = torch.randn(100, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_openvino_gives_the_answers_of_pytorch(classifier: Classifier) -> None:
    """The shipped checkpoint, in this processor's number format."""
    fast = engine.load_fastest(DEFAULT_CHECKPOINT, engine.native_precision())
    assert isinstance(fast.network, OpenVINONetwork)
    pictures = [open_picture(path) for path in find_pictures(ROOT / "examples")]
    for ours, theirs in zip(fast.predict(pictures), classifier.predict(pictures), strict=True):
        assert (ours.label, ours.verdict) == (theirs.label, theirs.verdict)
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=0.05)
    assert fast.sha256 == classifier.sha256


@pytest.fixture(scope="module")
def compiled(tiny_network: nn.Module) -> OpenVINONetwork:
    return engine.compile_network(tiny_network, 64, at_once=2)


def test_an_answer_stays_when_the_next_one_comes(compiled: OpenVINONetwork) -> None:
    """OpenVINO writes every answer to the same memory."""
    first = compiled(torch.zeros(1, 3, 64, 64))
    before = first.clone()
    compiled(torch.ones(1, 3, 64, 64))
    assert torch.equal(first, before)


def test_threads_at_once_get_their_own_answers(compiled: OpenVINONetwork, tiny_network: nn.Module) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = torch.cat(list(pool.map(compiled, INPUTS[:, None])))
    torch.testing.assert_close(answers, tiny_network(INPUTS), rtol=0.02, atol=0.02)
    assert answers.unique(dim=0).shape[0] > 75


def test_a_compiled_network_has_the_weights_of_its_source(compiled: OpenVINONetwork, tiny_network: nn.Module) -> None:
    theirs, ours = tiny_network.state_dict(), compiled.state_dict()
    assert len(theirs) > 10
    for expected, weights in zip(theirs.values(), ours.values(), strict=True):
        assert torch.equal(weights, expected)


def test_any_number_of_pictures_is_answered_alike(compiled: OpenVINONetwork, tiny_network: nn.Module) -> None:
    together = compiled(INPUTS[:5])
    torch.testing.assert_close(together, tiny_network(INPUTS[:5]), rtol=0.02, atol=0.02)
    alone = torch.cat([compiled(one[None]) for one in INPUTS[:5]])
    torch.testing.assert_close(alone, together, rtol=0.02, atol=0.02)


@pytest.fixture(scope="module")
def converted(tiny_network: nn.Module) -> Any:
    return engine.convert_network(model.for_inference(tiny_network, torch.float32), 64)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: Any) -> Path:
    """A checkpoint of the tiny network, with an empty cache. Converting it takes no time here."""
    monkeypatch.setattr(engine, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(engine, "convert_network", lambda *_: converted.clone())
    return tiny_checkpoint


def save_quantized(checkpoint: Path, converted: Any, max_shift: float = 0.0) -> None:
    """Save a network in place of the 8-bit one."""
    engine.save_converted(converted, engine.quantized_path(checkpoint), engine.sha256(checkpoint), max_shift)


@pytest.fixture
def quantized(checkpoint: Path, converted: Any) -> Path:
    """The checkpoint with an 8-bit network beside it, which in fact is the network itself."""
    save_quantized(checkpoint, converted)
    return checkpoint


@pytest.fixture
def openvino_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What any measurement finds."""
    fastest = f"OpenVINO {engine.native_precision()}"

    def measure(networks: dict[str, nn.Module], _size: int) -> dict[str, float]:
        return {name: 10.0 if name == fastest else 30.0 for name in networks}

    monkeypatch.setattr(engine, "milliseconds_per_picture", measure)


def labels(predictions: list[Prediction]) -> list[tuple[str, str]]:
    return [(prediction.label, prediction.verdict) for prediction in predictions]


def test_close_cases_of_the_8_bit_network_get_the_checkpoints_verdicts(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that multiplies the odds of a meme by 1.2 stands for the 8-bit one: it is off by 0.05 at most."""
    exact = Classifier.load(checkpoint, torch.float32)
    network = copy.deepcopy(exact.network)
    network.get_parameter("classifier.bias")[exact.classes.index(model.MEME)] += exact.temperature * math.log(1.2)
    monkeypatch.undo()  # of the conversion
    save_quantized(checkpoint, engine.convert_network(network, 64), max_shift=0.05)
    monkeypatch.setattr(model, "build_network", build_tiny_network)
    fast = engine.load_fastest(checkpoint, INT8)
    assert fast.rounding == 0.05
    probabilities = sorted(prediction.meme_probability for prediction in exact.answer(INPUTS))
    low, threshold, high = (sum(probabilities[at : at + 2]) / 2 for at in (25, 50, 75))
    expected = dataclasses.replace(exact, threshold=threshold, not_sure=(low, high)).answer(INPUTS)
    fast = dataclasses.replace(fast, threshold=threshold, not_sure=(low, high))
    answers = fast.answer(INPUTS)
    assert labels(answers) == labels(expected)
    # Without the second computation, they differ.
    assert labels(dataclasses.replace(fast, exact=None).answer(INPUTS)) != labels(expected)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=0.05)


def test_the_fastest_engine_is_measured_once(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "fastest_dtype", lambda _device=None: torch.bfloat16)
    monkeypatch.setattr(model, "fastest_dtype", lambda _device=None: torch.bfloat16)
    monkeypatch.setattr(engine, "native_precision", lambda: BF16)
    names = {f"{name.replace(' on cpu,', '')}": name for name in ENGINES}
    for fastest, described in names.items():
        measured: list[dict[str, nn.Module]] = []

        def measure(
            networks: dict[str, nn.Module], _size: int, fastest: str = fastest, measured: list[Any] = measured
        ) -> dict[str, float]:
            measured.append(networks)
            return {name: 10.0 if name == fastest else 30.0 for name in networks}

        monkeypatch.setattr(engine, "milliseconds_per_picture", measure)
        for _ in range(2):
            classifier = engine.load_fastest(quantized)
            assert engine.describe_engine(classifier.network) == described
            assert classifier.exact is not None
        assert len(measured) == 1
        assert {name: engine.describe_engine(network) for name, network in measured[0].items()} == names
        said = capsys.readouterr().err
        assert said.startswith(f"Measured once on this processor, time for a picture: {fastest} 10 ms, ")
        assert said.count("\n") == 1
        (kept,) = (quantized.parent / "cache").glob("speed-*.json")
        kept.write_text("broken")
    engine.load_fastest(quantized)
    assert len(measured) == 2
    engine.quantized_path(quantized).unlink()  # another set of engines is measured again
    engine.load_fastest(quantized)
    assert measured[2].keys() == names.keys() - {"OpenVINO int8"}


def test_without_bfloat16_full_precision_and_8_bits_are_measured(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine, model):
        monkeypatch.setattr(module, "fastest_dtype", lambda _device=None: torch.float32)
    monkeypatch.setattr(engine, "native_precision", lambda: FP32)
    measured = list[str]()

    def measure(networks: dict[str, nn.Module], _size: int) -> dict[str, float]:
        measured.extend(networks)
        return dict.fromkeys(networks, 1.0)

    monkeypatch.setattr(engine, "milliseconds_per_picture", measure)
    engine.load_fastest(quantized)
    assert measured == ["PyTorch fp32", "OpenVINO fp32", "OpenVINO int8"]


def test_the_measurement_tells_a_slow_network_from_a_fast_one(compiled: OpenVINONetwork) -> None:
    class Slow(nn.Module):
        def forward(self, inputs: Tensor) -> object:
            return [compiled(inputs) for _ in range(5)]

    taken = engine.milliseconds_per_picture({"slow": Slow(), FP32: compiled}, 64)
    assert 0 < taken[FP32] < taken["slow"]


def test_the_conversion_is_kept(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine.load_fastest(checkpoint, FP32)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "convert_network", lambda *_: pytest.fail("converted again"))
        second = engine.load_fastest(checkpoint, FP32)
    assert torch.equal(first.network(INPUTS), second.network(INPUTS))
    (weights,) = (checkpoint.parent / "cache").glob("*.bin")
    weights.write_bytes(b"damaged")
    assert torch.equal(engine.load_fastest(checkpoint, FP32).network(INPUTS), first.network(INPUTS))
    monkeypatch.setattr(engine, "cache_folder", lambda: checkpoint)  # a file: nothing can be kept there
    assert torch.equal(engine.load_fastest(checkpoint, FP32).network(INPUTS), first.network(INPUTS))


@pytest.mark.usefixtures("openvino_is_fastest")
def test_an_8_bit_network_of_another_checkpoint_is_not_used(
    checkpoint: Path, converted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_quantized(checkpoint, converted)
    content = torch.load(checkpoint, weights_only=True) | {"temperature": 3.0}
    model.write_checkpoint(content, checkpoint)
    network = engine.load_fastest(checkpoint).network
    assert isinstance(network, OpenVINONetwork)
    assert network.precision == engine.native_precision()
    warning, _ = capsys.readouterr().err.splitlines()
    assert warning == f"{checkpoint.stem}.int8.xml was made from another checkpoint. It is not used."
    with pytest.raises(BadEngine, match=r"another checkpoint\. Make it with `python -m training\.quantize`\.$"):
        engine.load_fastest(checkpoint, INT8)


@pytest.mark.usefixtures("openvino_is_fastest")
@pytest.mark.parametrize("kind", ["weights missing", "weights changed", "empty", "cut", "no digest", "text"])
def test_a_damaged_8_bit_network_is_not_used(
    kind: str, checkpoint: Path, converted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_quantized(checkpoint, converted)
    path = engine.quantized_path(checkpoint)
    weights, content = path.with_suffix(".bin"), path.read_text()
    if kind == "weights missing":
        weights.unlink()
    elif kind == "weights changed":
        weights.write_bytes(bytes(byte ^ 1 for byte in weights.read_bytes()))
    elif kind == "no digest":
        path.write_text(re.sub(r"<checkpoint_sha256.*?/>", "", content))
    else:
        path.write_text({"empty": "", "cut": content[: len(content) // 2], "text": "no network"}[kind])
    with pytest.raises(BadConversion):
        engine.read_converted(path, Classifier.load(checkpoint).sha256)
    network = engine.load_fastest(checkpoint).network
    assert isinstance(network, OpenVINONetwork)
    assert network.precision == engine.native_precision()
    warning, _ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r".*\.int8\.\w+.* It is not used\.", warning)


@pytest.mark.usefixtures("openvino_is_fastest")
def test_without_an_8_bit_network_the_others_are_measured(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.describe_engine(engine.load_fastest(checkpoint).network).startswith("OpenVINO on cpu, ")
    (said,) = capsys.readouterr().err.splitlines()
    assert "PyTorch" in said
    assert "int8" not in said
    with pytest.raises(BadEngine, match=r"^There is no \S+\.int8\.xml\. Make it with"):
        engine.load_fastest(checkpoint, INT8)


def test_without_openvino_pytorch_answers(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _name: None)
    assert engine.best_engine() == engine.TORCH
    fallback = engine.load_fastest(checkpoint, FP32)
    assert torch.equal(fallback.network(INPUTS), Classifier.load(checkpoint, torch.float32).network(INPUTS))
    assert engine.describe_engine(fallback.network) == "PyTorch on cpu, fp32"
    with pytest.raises(BadEngine, match="--precision int8 needs OpenVINO"):
        engine.load_fastest(checkpoint, INT8)


@pytest.mark.parametrize("installed", [True, False])
def test_bfloat16_is_refused_where_the_processor_lacks_it(
    installed: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "best_engine", lambda: engine.OPENVINO if installed else engine.TORCH)
    monkeypatch.setattr(engine, "native_precision", lambda: FP32)
    monkeypatch.setattr(engine, "fastest_dtype", lambda _device=None: torch.float32)
    with pytest.raises(BadEngine, match="does not multiply bfloat16"):
        engine.load_fastest(checkpoint, BF16)
    assert engine.load_fastest(checkpoint, AUTO).sha256


def test_a_device_that_is_not_there_is_refused() -> None:
    assert engine.find_device("cpu").type == "cpu"
    assert engine.find_device(AUTO).type == (ACCELERATOR.type if ACCELERATOR else "cpu")
    for name in {"cuda", "mps", "xpu"} - {ACCELERATOR.type if ACCELERATOR else ""}:
        with pytest.raises(BadEngine, match=rf"^This computer has no {name} device"):
            engine.find_device(name)
    with pytest.raises(BadEngine, match=r"^The device tpu is unknown"):
        engine.find_device("tpu")


def test_the_page_runs_where_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[torch.device]()
    monkeypatch.setattr(Classifier, "load", lambda _path=None, _dtype=None, device=model.CPU: loaded.append(device))
    monkeypatch.delenv("MEME_DEVICE", raising=False)
    engine.load_for_page()
    monkeypatch.setenv("MEME_DEVICE", "auto")
    engine.load_for_page()
    assert [device.type for device in loaded] == ["cpu", ACCELERATOR.type if ACCELERATOR else "cpu"]
    monkeypatch.setenv("MEME_DEVICE", "toaster")
    with pytest.raises(BadEngine, match="toaster"):
        engine.load_for_page()


@pytest.mark.skipif(ACCELERATOR is None, reason="this computer has no accelerator")
def test_an_accelerator_gives_the_cpus_answers(classifier: Classifier) -> None:
    pictures = [open_picture(path) for path in find_pictures(ROOT / "examples")]
    there = engine.load_fastest(DEFAULT_CHECKPOINT, device=AUTO)
    assert engine.device_of(there.network) == ACCELERATOR
    for ours, theirs in zip(there.predict(pictures), classifier.predict(pictures), strict=True):
        assert (ours.label, ours.verdict) == (theirs.label, theirs.verdict)
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=ROUNDING)


def test_batches_fit_the_devices_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for gigabytes, expected in ((80, 64), (2, 16), (0.01, 1)):
        free = int(gigabytes * 2**30)
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _device, free=free: (free, 80 * 2**30))
        assert engine.batch_size(gpu) == expected

    def unknown(_device: torch.device) -> None:
        raise RuntimeError("this backend does not report its memory")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", unknown)
    assert engine.batch_size(gpu) == engine.batch_size(torch.device("cpu")) == engine.BATCH


class SmallMemory(nn.Module):
    """A network on a device whose memory holds only a few pictures."""

    def __init__(self, network: nn.Module, holds: int, error: Exception) -> None:
        super().__init__()
        self.network = network
        self.holds = holds
        self.error = error
        self.batches = list[int]()

    def forward(self, inputs: Tensor) -> Tensor:
        self.batches.append(len(inputs))
        if len(inputs) > self.holds:
            raise self.error
        outputs: Tensor = self.network(inputs)
        return outputs


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory (9 GB)")]
)
@pytest.mark.parametrize(("count", "holds"), [(16, 5), (13, 1), (3, 2), (4, 4), (1, 1)])
def test_out_of_memory_halves_the_batch(error: Exception, count: int, holds: int, tiny_classifier: Classifier) -> None:
    small = SmallMemory(tiny_classifier.network, holds, error)
    answers = engine.answer_in_parts(dataclasses.replace(tiny_classifier, network=small).answer, INPUTS[:count])
    expected = tiny_classifier.answer(INPUTS[:count])
    assert [a.label for a in answers] == [e.label for e in expected]
    assert [a.meme_probability for a in answers] == pytest.approx([e.meme_probability for e in expected], abs=1e-5)
    assert sum(batch for batch in small.batches if batch <= holds) == count


def test_memory_for_no_picture_at_all_is_one_sentence(tiny_classifier: Classifier) -> None:
    none = SmallMemory(tiny_classifier.network, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(BadEngine, match=r"^The device has too little free memory for one picture; try --device cpu\.$"):
        engine.answer_in_parts(dataclasses.replace(tiny_classifier, network=none).answer, INPUTS[:4])


def test_other_errors_of_a_device_are_not_taken_for_a_full_memory(tiny_classifier: Classifier) -> None:
    broken = SmallMemory(tiny_classifier.network, 0, RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine.answer_in_parts(dataclasses.replace(tiny_classifier, network=broken).answer, INPUTS[:4])
    assert broken.batches == [4]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cores: int, files: dict[str, str]) -> None:
    """Report this many cores of the host to this process, and the control groups in these files."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(cores)))
    monkeypatch.setattr(engine, "PROC", tmp_path / "proc")
    write(tmp_path, {name: text.replace("TMP", str(tmp_path)) for name, text in files.items()})


VERSION_2 = {"proc/mountinfo": "35 24 0:30 / TMP/sys rw,relatime shared:4 - cgroup2 cgroup rw,nsdelegate\n"}
VERSION_1 = {
    "proc/mountinfo": "30 24 0:28 / TMP/sys/memory rw - cgroup cgroup rw,memory\n"
    "33 24 0:30 / TMP/sys/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "41 24 0:38 / TMP/sys/unified rw shared:5 - cgroup2 cgroup2 rw\n"
}
# Version 1, with the container's own group as the root of the mount but the host's path in /proc/self/cgroup.
VERSION_1_CONTAINER = {
    "proc/mountinfo": "33 24 0:30 /docker/1a TMP/sys/cpu rw - cgroup cgroup rw,cpu\n",
    "proc/cgroup": "7:cpu:/docker/1a\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32),  # no Linux
        (VERSION_2 | {"proc/cgroup": "0::/\n"}, 32),  # the root group has no cpu.max
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/cpu.max": "200000 100000\n"}, 2),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/cpu.max": "max 100000\n"}, 32),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/cpu.max": "150000 100000\n"}, 2),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/cpu.max": "1000 100000\n"}, 1),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/cpu.max": "9900000 100000\n"}, 32),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/cpu.max": "broken"}, 32),
        (VERSION_2 | {"proc/cgroup": "0::/../other\n", "sys/cpu.max": "300000 100000\n"}, 3),
        (  # the tightest of the nested groups counts, whichever it is
            VERSION_2
            | {
                "proc/cgroup": "0::/pod/app\n",
                "sys/pod/cpu.max": "300000 100000\n",
                "sys/pod/app/cpu.max": "max 100000\n",
                "sys/pod/other/cpu.max": "100000 100000\n",
            },
            3,
        ),
        (
            VERSION_2
            | {
                "proc/cgroup": "0::/pod/app\n",
                "sys/pod/cpu.max": "800000 100000\n",
                "sys/pod/app/cpu.max": "50000 25000\n",
            },
            2,
        ),
        (
            VERSION_1
            | {
                "proc/cgroup": "9:memory:/\n4:cpu,cpuacct:/pod/app\n0::/\n",
                "sys/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/cpu,cpuacct/pod/cpu.cfs_quota_us": "410000\n",
                "sys/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n",
                "sys/cpu,cpuacct/pod/app/cpu.cfs_quota_us": "-1\n",
                "sys/cpu,cpuacct/pod/app/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            VERSION_1_CONTAINER | {"sys/cpu/cpu.cfs_quota_us": "250000\n", "sys/cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
    ],
)
def test_cores_follow_the_quota_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    pretend(monkeypatch, tmp_path, 32, files)
    assert engine.usable_cores() == expected


def test_cores_follow_the_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, 3, {})
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    assert engine.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    assert engine.usable_cores() == 32
    monkeypatch.setattr(os, "cpu_count", lambda: None)  # unknown
    assert engine.usable_cores() == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8_192_000),  # 1000 pages of 8 KiB: the machine's
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/memory.max": "max\n"}, 8_192_000),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/memory.max": "4096000\n"}, 4_096_000),
        (VERSION_2 | {"proc/cgroup": "0::/\n", "sys/memory.max": "9999999999\n"}, 8_192_000),
        (
            VERSION_2
            | {"proc/cgroup": "0::/pod/app\n", "sys/pod/memory.max": "4096\n", "sys/pod/app/memory.max": "max\n"},
            4096,
        ),
        (
            VERSION_1
            | {
                "proc/cgroup": "9:memory:/pod\n4:cpu,cpuacct:/other\n0::/\n",
                "sys/memory/memory.limit_in_bytes": "9223372036854771712\n",  # no limit
                "sys/memory/pod/memory.limit_in_bytes": "5000\n",
            },
            5000,
        ),
    ],
)
def test_memory_follows_the_limit_of_the_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    pretend(monkeypatch, tmp_path, 32, files)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 8192, "SC_PHYS_PAGES": 1000}.__getitem__)
    assert engine.memory_limit() == expected
    if not files:
        monkeypatch.delattr(os, "sysconf")  # Windows
        assert engine.memory_limit() == float("inf")


def test_folders_go_on_when_memory_is_short(tiny_classifier: Classifier, tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed:02}.png" for seed in range(20)]
    for seed, path in enumerate(paths):
        noise(64, 64, seed).save(path)
    expected = [answer for _, answer in classify.classify(tiny_classifier, paths)]
    small = SmallMemory(tiny_classifier.network, 3, torch.OutOfMemoryError("CUDA out of memory."))
    answers = list(classify.classify(dataclasses.replace(tiny_classifier, network=small), paths))
    assert [path for path, _ in answers] == paths
    for (_, ours), theirs in zip(answers, expected, strict=True):
        assert isinstance(ours, Prediction)
        assert isinstance(theirs, Prediction)
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=1e-5)


@pytest.mark.skipif(ACCELERATOR is not None, reason="this computer has an accelerator")
@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--device=cuda", "This computer has no cuda device that this PyTorch can use; try --device auto."),
        ("--precision=int8", "There is no tiny.int8.xml. Make it with `python -m training.quantize`."),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    option: str,
    sentence: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture, table = checkpoint.with_name("picture.png"), checkpoint.with_name("table.csv")
    noise(64, 64).save(picture)
    arguments = [str(picture), "--csv", str(table), "--checkpoint", str(checkpoint), option]
    monkeypatch.setattr(sys, "argv", ["classify.py", *arguments])
    assert classify.main() == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"classify.py: error: {sentence}"
    assert not table.exists()


def test_answers_stay_in_order_whichever_is_ready_first(folder: Path, tiny_classifier: Classifier) -> None:
    """Several batches are answered at once; the earlier ones take longer here, and some files cannot be read."""
    paths = sorted(folder.rglob("*.png"))
    for path in paths[::5]:
        path.write_bytes(b"no picture")
    paths = paths * 8
    batches = itertools.count()

    def slow_at_first(inputs: Tensor) -> list[float]:
        time.sleep(0.2 / (1 + next(batches)))
        return inputs.mean((1, 2, 3)).tolist()

    found = list(engine.classify_batches(tiny_classifier, paths, slow_at_first))
    assert [path for path, _ in found] == paths
    assert next(batches) == math.ceil(len(paths) / BATCH) > 4
    for path, answer in found:
        if isinstance(answer, BadImage):
            assert path.read_bytes() == b"no picture"
        else:
            (inputs,) = tiny_classifier.preprocess([open_picture(path)])
            assert answer == pytest.approx(float(inputs.mean()), abs=1e-5)


def test_who_stops_early_does_not_wait_for_what_has_not_begun() -> None:
    begun = []

    def work(item: int) -> int:
        time.sleep(0.05)
        begun.append(item)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = engine.map_in_order(pool, work, itertools.count(), ahead=20)
        assert next(results) == 0
        results.close()
    assert len(begun) <= 3


def test_a_signal_finds_its_stack_after_several_networks() -> None:
    """In a process of its own, because it crashes without this."""
    script = """if True:
        import gc, os, signal
        from pathlib import Path
        from engine import load_fastest
        got = []
        signal.signal(signal.SIGINT, lambda *_: got.append("Ctrl-C"))
        networks = [load_fastest(Path("best_model.pth"), "int8") for _ in range(3)]
        del networks[0], networks[1], networks[0]
        gc.collect()
        os.kill(os.getpid(), signal.SIGINT)
        print(got)
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "['Ctrl-C']\n"), done.stderr
