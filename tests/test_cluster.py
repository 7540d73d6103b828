"""Classifying on a real Ray cluster, whose workers all run on this machine."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.dataset as pd
import pytest
import torch
from commands import run
from fsspec.implementations.memory import MemoryFile
from pictures import ROOT, encode, noise

import classify
import cluster
from engine import quantized_path
from images import MAX_MEGABYTES, PictureSearch, find_pictures, open_picture, to_square
from model import DEFAULT_CHECKPOINT, MEME, NOT_MEME, Classifier, write_checkpoint
from tables import BadTable, lock_tables

NORMAL_PRIORITY = {"RAY_worker_niceness": "0"}  # else all other work on this machine goes first


class RayCluster:
    """A cluster with one worker of two cores, see `ray_cluster.py`. OpenVINO, slow to start, is missing there.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text('import sys\nsys.modules["openvino"] = None\n')
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("ray_cluster.py")],
            # A lost worker is noticed after five periods.
            env=os.environ | NORMAL_PRIORITY | {"PYTHONPATH": str(folder), "RAY_health_check_period_ms": "1000"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self.read_line()

    def read_line(self) -> str:
        """Wait for what the process prints next."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"the cluster ended with {self.process.wait()}"
        return line.strip()

    def command(self, word: str) -> None:
        """Add a worker, or remove it without warning."""
        assert self.process.stdin
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        assert self.read_line() == "done"


@pytest.fixture(scope="module")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster that the tests of this file share."""
    cluster = RayCluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.process.communicate()


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with an input of 64 × 64 pixels, which takes less time."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    write_checkpoint(torch.load(DEFAULT_CHECKPOINT, weights_only=True) | {"input_size": 64}, path)
    return path


def start(address: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start classify.py on the cluster at an address, in a process of its own: Ray leaves threads behind."""
    command = [sys.executable, str(ROOT / "classify.py"), *map(str, arguments), "--engine", "ray"]
    environment = os.environ | NORMAL_PRIORITY | {"RAY_ADDRESS": address}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_lost_worker_loses_and_duplicates_no_picture(
    ray_cluster: RayCluster, small_checkpoint: Path, tmp_path: Path
) -> None:
    folder, table, count = tmp_path / "pictures", tmp_path / "table", 10 * cluster.BLOCK
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04}.png").write_bytes(encode(noise(60, 40, number)))
    (folder / "0007.png").write_bytes(b"no picture")
    ray_cluster.command("add")
    running = start(ray_cluster.address, folder, "--checkpoint", small_checkpoint, "--parquet", table)
    deadline = time.monotonic() + 120
    while not list(table.glob("*.parquet")):
        if running.poll() is not None or time.monotonic() > deadline:
            running.kill()
            pytest.fail(running.communicate()[1])
        time.sleep(0.05)
    ray_cluster.command("remove")
    assert len(list(table.glob("*.parquet"))) < 10
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 1, errors
    assert f"{count - 1} pictures classified, 1 file failed" in errors
    rows = pd.dataset(table).to_table().to_pylist()
    assert Counter(row["path"] for row in rows) == Counter(map(str, find_pictures(folder)))
    classifier = Classifier.load(small_checkpoint)
    for row in rows[:50]:
        if row["error"]:
            assert row["path"].endswith("0007.png")
        else:
            (expected,) = classifier.predict([open_picture(row["path"])])
            assert row["meme_probability"] == pytest.approx(expected.meme_probability, abs=0.02)


def test_addresses_are_read_and_written(
    ray_cluster: RayCluster,
    small_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table, examples = tmp_path / "table", (ROOT / "examples").as_uri()
    running = start(ray_cluster.address, "-", "--checkpoint", small_checkpoint, "--json", table.as_uri())
    _, errors = running.communicate(examples + "\n", timeout=240)
    assert running.returncode == 0, errors
    rows = pd.dataset(table, format="json").to_table().to_pylist()
    assert sorted(row["path"] for row in rows) == [path.as_uri() for path in find_pictures(ROOT / "examples")]
    assert all(row["verdict"] for row in rows)
    again = (examples, "--json", table.as_uri(), "--engine", "ray")
    assert run(monkeypatch, classify.main, None, *again) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_worker_that_lacks_openvino_is_one_sentence(ray_cluster: RayCluster, tmp_path: Path) -> None:
    """With an 8-bit network beside the checkpoint; the driver does not read it."""
    checkpoint = tmp_path / "best.pth"
    shutil.copy(DEFAULT_CHECKPOINT, checkpoint)
    quantized_path(checkpoint).touch()
    options = ("--checkpoint", checkpoint, "--precision", "int8", "--device", "cpu", "--csv", tmp_path / "table")
    running = start(ray_cluster.address, ROOT / "examples", *options)
    _, errors = running.communicate(timeout=240)
    assert running.returncode == 2
    assert errors.splitlines()[-1] == (
        "classify.py: error: A worker of the cluster cannot classify: --precision int8 needs OpenVINO "
        "(pip install -r requirements-fast.txt) and --device cpu, and gives no heatmaps."
    )


def test_a_second_run_into_the_same_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("it began"))
    table = tmp_path / "table"
    with lock_tables([table]):
        assert run(monkeypatch, classify.main, None, ROOT / "examples", "--engine", "ray", "--csv", table) == 2
    assert f"Another run is writing to {table}." in capsys.readouterr().err


def test_without_an_address_ray_starts_a_cluster_on_this_machine(tmp_path: Path) -> None:
    """The command as a user types it, with the shipped checkpoint."""
    table = tmp_path / "table"
    command = [sys.executable, "classify.py", "examples", "--engine", "ray", "--csv", str(table)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    verdicts = {row["path"]: row["verdict"] for row in pd.dataset(table, format="csv").to_table().to_pylist()}
    assert verdicts.keys() == {str(path.relative_to(ROOT)) for path in find_pictures(ROOT / "examples")}
    assert verdicts["examples/cat_meme.jpg"] == MEME
    assert verdicts["examples/mountains.jpg"] == NOT_MEME


def test_a_cluster_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(*_: object, **__: object) -> None:
        raise ConnectionError("Nobody is there")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    arguments = (ROOT / "examples", "--engine", "ray", "--csv", tmp_path / "table")
    assert run(monkeypatch, classify.main, None, *arguments) == 2
    *_, said = capsys.readouterr().err.splitlines()  # after what was found and skipped
    assert said == "classify.py: error: RAY_ADDRESS=auto cannot be used: Nobody is there."


def test_no_pictures_need_no_cluster(tmp_path: Path) -> None:
    assert cluster.classify_on_cluster([], tmp_path / "none.pth", str(tmp_path / "table"), "csv") == (0, 0)
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "0.csv").touch()
    with pytest.raises(BadTable, match="is there already"):
        cluster.classify_on_cluster(["x.jpg"], tmp_path / "none.pth", str(tmp_path / "table"), "csv")


def test_pictures_are_found_and_read_anywhere() -> None:
    files = fsspec.filesystem("memory")
    content = encode(noise(40, 40))
    for name in ("/album/one/b.PNG", "/album/a.jpg", "/album/notes.txt"):
        files.pipe(name, content)
    assert cluster.list_pictures_at("memory://album") == ["memory:///album/a.jpg", "memory:///album/one/b.PNG"]
    assert cluster.list_pictures_at("memory://album/a.jpg") == ["memory://album/a.jpg"]
    seen = cluster.load_input({"path": b"x", "place": b"memory://album/a.jpg"}, 32)
    assert not seen["error"]
    assert (seen["square"] == to_square(open_picture(content), 32)).all()
    missing = cluster.load_input({"path": b"x", "place": b"memory://album/none.jpg"}, 32)
    assert missing["error"].startswith("This file cannot be read: ")


def test_a_search_of_an_address_leaves_out_what_a_folder_search_does() -> None:
    files = fsspec.filesystem("memory")
    content = encode(noise(40, 40))
    names = ["a.HIF", "._a.jpg", "@eaDir/a.jpg", "x/.thumbnails/y/a.jpg", "x/no_ending", "__MACOSX/a.jpg", "jpg"]
    for name in names:
        files.pipe(f"/nas/{name}", content)
    files.pipe("/nas/notes.txt", b"BMW")
    search = PictureSearch()
    assert cluster.list_pictures_at("memory://nas", search) == ["memory:///nas/a.HIF"]
    assert search.skipped_files == {f"/nas/{name}" for name in ("._a.jpg", "x/no_ending", "jpg", "notes.txt")}
    assert search.hidden_folders == {"/nas/@eaDir/", "/nas/x/.thumbnails/", "/nas/__MACOSX/"}
    assert cluster.list_pictures_at("memory://nas/@eaDir") == ["memory:///nas/@eaDir/a.jpg"]
    found = cluster.list_pictures_at("memory://nas", PictureSearch(include_hidden=True, all_files=True))
    assert found == sorted(f"memory:///nas/{name}" for name in names)


def test_what_is_too_large_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/large.jpg", b"x" * (MAX_MEGABYTES * 1_000_000 + 5_000_000))
    asked: list[int] = []
    read = MemoryFile.read

    def spy(self: MemoryFile, size: int = -1) -> bytes:
        asked.append(size)
        return bytes(read(self, size))

    monkeypatch.setattr(MemoryFile, "read", spy)
    seen = cluster.load_input({"path": b"x", "place": b"memory://large.jpg"}, 32)
    assert seen["error"] == "This file has more than 10 MB, which is the limit."
    assert asked == [MAX_MEGABYTES * 1_000_000 + 1]


def test_a_cluster_writes_one_table_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("--csv", "a", "--json", "b"), ("--csv", "a", "--overlays", "c")):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, classify.main, None, "x.jpg", "--engine", "ray", *more)
        assert stop.value.code == 2
        assert "there must be one of --csv, --json, --parquet" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["nosuch://bucket/folder", "s3://bucket/folder", "ftp://127.0.0.1:9/folder"])
def test_an_address_that_nothing_here_can_read_is_named(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    for paths, table in ((address, tmp_path / "t"), (ROOT / "examples", address)):
        assert run(monkeypatch, classify.main, None, paths, "--engine", "ray", "--csv", table) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith(f"classify.py: error: {address} cannot be used: ")
        assert "Traceback" not in said
