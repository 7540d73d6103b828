import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pictures import ROOT
from torch import nn

import engine
from images import find_pictures, open_picture
from model import DEFAULT_CHECKPOINT, Classifier


@pytest.fixture(scope="module")
def fast() -> Classifier:
    return engine.load_fastest(DEFAULT_CHECKPOINT)


def test_openvino_gives_the_answers_of_pytorch(fast: Classifier, classifier: Classifier) -> None:
    assert isinstance(fast.network, engine.OpenVINONetwork)
    pictures = [open_picture(path) for path in find_pictures(ROOT / "examples")]
    for ours, theirs in zip(fast.predict(pictures), classifier.predict(pictures), strict=True):
        assert ours.verdict == theirs.verdict
        assert ours.meme_probability == pytest.approx(theirs.meme_probability, abs=0.02)
    assert fast.sha256 == classifier.sha256


def test_an_answer_stays_when_the_next_one_comes(fast: Classifier) -> None:
    """OpenVINO writes every answer to the same memory."""
    size = fast.preprocessing.input_size
    first = fast.network(torch.zeros(1, 3, size, size))
    before = first.clone()
    fast.network(torch.ones(1, 3, size, size))
    assert torch.equal(first, before)


def test_threads_at_once_get_their_own_answers(tiny_network: nn.Module) -> None:
    compiled = engine.compile_network(tiny_network, 64, at_once=2)
    inputs = torch.randn(200, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool:
        answers = torch.cat(list(pool.map(compiled, inputs)))
    torch.testing.assert_close(answers, tiny_network(inputs[:, 0]), rtol=0.02, atol=0.02)
    assert answers.unique(dim=0).shape[0] > 150


def test_a_compiled_network_has_the_weights_of_its_source(tiny_network: nn.Module) -> None:
    theirs, ours = tiny_network.state_dict(), engine.compile_network(tiny_network, 64).state_dict()
    assert len(theirs) > 10
    for expected, weights in zip(theirs.values(), ours.values(), strict=True):
        assert torch.equal(weights, expected)


def test_any_number_of_pictures_is_answered_alike(tiny_network: nn.Module) -> None:
    compiled = engine.compile_network(tiny_network, 64)
    inputs = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = compiled(inputs)
    torch.testing.assert_close(together, tiny_network(inputs), rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.cat([compiled(one[None]) for one in inputs]), together, rtol=0.02, atol=0.02)


def test_without_openvino_pytorch_answers(monkeypatch: pytest.MonkeyPatch, classifier: Classifier) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda _name: None)
    assert engine.best_engine() == "PyTorch"
    fallback = engine.load_fastest(DEFAULT_CHECKPOINT)
    size = classifier.preprocessing.input_size
    inputs = torch.zeros(1, 3, size, size)
    assert torch.equal(fallback.network(inputs), classifier.network(inputs))


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
