"""On a real cluster of two workers on this machine."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow.dataset as pd
import pytest
from commands import run
from fsspec.implementations.memory import MemoryFile
from pictures import ROOT, encode, noise
from ray.cluster_utils import Cluster

import classify
import cluster
from images import MAX_MEGABYTES, PictureSearch, find_pictures, open_picture, to_square
from model import MEME, Classifier
from tables import BadTable

# By default, all other work on the machine goes before Ray's workers: with other tests beside them, they starve.
NORMAL_PRIORITY = ("RAY_worker_niceness", "0")


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv(*NORMAL_PRIORITY)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=2)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def start(address: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "classify.py"), *map(str, arguments), "--engine", "ray"]
    environment = os.environ | {"RAY_ADDRESS": address} | dict([NORMAL_PRIORITY])
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_lost_worker_loses_and_doubles_no_picture(
    two_workers: Cluster, tmp_path: Path, classifier: Classifier
) -> None:
    folder, table = tmp_path / "pictures", tmp_path / "table"
    folder.mkdir()
    for number in range(384):
        (folder / f"{number:04}.jpg").write_bytes(encode(noise(300, 200, number), "JPEG"))
    (folder / "0007.jpg").write_bytes(b"no picture")
    running = start(two_workers.address, folder, "--parquet", table)
    while not list(table.glob("*.parquet")):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    victim = next(node for node in two_workers.worker_nodes)
    two_workers.remove_node(victim, allow_graceful=False)
    assert len(list(table.glob("*.parquet"))) < 384 / cluster.BLOCK
    _, errors = running.communicate(timeout=480)
    assert running.returncode == 1, errors
    assert "383 pictures classified, 1 files failed" in errors
    rows = pd.dataset(table).to_table().to_pylist()
    assert Counter(row["path"] for row in rows) == Counter(map(str, find_pictures(folder)))
    for row in rows[:50]:
        if row["error"]:
            assert row["path"].endswith("0007.jpg")
        else:
            (expected,) = classifier.predict([open_picture(row["path"])])
            assert row["meme_probability"] == pytest.approx(expected.meme_probability, abs=0.02)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_addresses_are_read_and_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an address of a cluster, Ray starts one on this machine."""
    table = tmp_path / "table"
    running = start("local", "-", f"--{kind}", table.as_uri())
    _, errors = running.communicate((ROOT / "examples").as_uri() + "\n", timeout=480)
    assert running.returncode == 0, errors
    rows = pd.dataset(table, format=kind).to_table().to_pylist()
    pictures = find_pictures(ROOT / "examples")
    assert sorted(row["path"] for row in rows) == [path.as_uri() for path in pictures]
    verdicts = {row["path"]: row["verdict"] for row in rows}
    assert verdicts[(ROOT / "examples" / "cat_meme.jpg").as_uri()] == MEME
    again = ((ROOT / "examples").as_uri(), f"--{kind}", table.as_uri(), "--engine", "ray")
    assert run(monkeypatch, classify.main, None, *again) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**_: object) -> None:
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
    seen = cluster.see({"path": b"x", "place": b"memory://album/a.jpg"}, 32)
    assert not seen["error"]
    assert (seen["square"] == to_square(open_picture(content), 32)).all()
    missing = cluster.see({"path": b"x", "place": b"memory://album/none.jpg"}, 32)
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
    seen = cluster.see({"path": b"x", "place": b"memory://large.jpg"}, 32)
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
