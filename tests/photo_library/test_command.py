"""classify.py with --xmp, --xmp-remove and --watch."""

import csv
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command, rows_of, run
from pictures import encode, noise

import classify
from images import find_pictures
from photo_library import watch
from photo_library.xmp import XmpDocument
from tables import READERS

LEAVES = {"meme": "Meme", "not_meme": "Not a meme", "not_sure": "Not sure"}


def tags_in(sidecar: Path) -> list[str]:
    return XmpDocument.parse(sidecar.read_bytes()).values("{http://www.digikam.org/ns/1.0/}TagsList")


def states(folder: Path, pattern: str = "*") -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob(pattern) if path.is_file()}


def test_every_picture_gets_its_verdict_once(folder: Path, tmp_path: Path, classify_tiny: Command) -> None:
    pictures = states(folder)
    arguments = (folder, "--csv", tmp_path / "a.csv", "--xmp")
    assert classify_tiny(*arguments) == 0
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 16
    for row in rows:
        sidecar = Path(row["path"] + ".xmp")
        assert tags_in(sidecar) == [f"Meme Classifier/{LEAVES[row['verdict']]}"]
        record = XmpDocument.parse(sidecar.read_bytes()).record()
        assert float(record["memeProbability"]) == float(row["meme_probability"])
    before = states(folder)
    assert pictures.items() <= before.items()
    assert len(before) == 32
    assert classify_tiny(*arguments) == 0
    assert classify_tiny(folder, "--xmp") == 0  # without the table: classified again
    assert states(folder) == before


def test_sidecars_that_an_earlier_run_did_not_write_are_written_from_the_table(
    folder: Path, tmp_path: Path, classify_tiny: Command
) -> None:
    arguments = (folder, "--csv", tmp_path / "a.csv")
    assert classify_tiny(*arguments) == 0
    table = (tmp_path / "a.csv").read_bytes()
    assert classify_tiny(*arguments, "--xmp") == 0
    assert (tmp_path / "a.csv").read_bytes() == table
    written = states(folder, "*.xmp")
    assert len(written) == 16
    next(iter(written)).unlink()
    assert classify_tiny(*arguments, "--xmp") == 0
    assert len(states(folder, "*.xmp")) == 16


def test_a_sidecar_that_cannot_be_used_is_that_pictures_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    broken = folder / "meme" / "one" / "0.png.xmp"
    broken.write_bytes(b"<x:xmpmeta>")
    arguments = (folder, "--csv", tmp_path / "a.csv", "--xmp")
    for _ in range(2):
        assert classify_tiny(*arguments) == 1
        errors = {row["path"]: (row["error"], row["verdict"]) for row in rows_of(tmp_path / "a.csv") if row["error"]}
        assert list(errors) == [str(broken.with_suffix(""))]
        ((sentence, verdict),) = errors.values()
        assert sentence == "Its sidecar 0.png.xmp is not well-formed XML and was left alone."
        assert verdict  # the answer is there all the same
        assert f"{broken.with_suffix('')}: Its sidecar" in capsys.readouterr().err
        assert len(rows_of(tmp_path / "a.csv")) == 16
    assert broken.read_bytes() == b"<x:xmpmeta>"
    assert len(states(folder, "*.xmp")) == 16
    broken.unlink()
    assert classify_tiny(*arguments) == 0
    assert not [row for row in rows_of(tmp_path / "a.csv") if row["error"]]


def test_options_say_what_is_written_and_it_can_be_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    before = states(folder)
    options = ("--xmp", "--xmp-style", "lightroom", "--xmp-tag", "Sorted|Fun", "--xmp-only", "not_sure")
    assert classify_tiny(folder, *options) == 0
    verdicts = {
        Path(row["path"]).with_suffix(".xmp"): row["verdict"]
        for row in csv.DictReader(capsys.readouterr().out.splitlines())
    }
    expected = {path for path, verdict in verdicts.items() if verdict == "not_sure"}
    assert set(states(folder, "*.xmp")) == expected
    assert all(tags_in(path) == ["Sorted/Fun/Not sure"] for path in expected)
    assert run(monkeypatch, classify.main, None, folder, "--xmp-remove") == 0
    assert f"Tags removed from {len(expected)} sidecar" in capsys.readouterr().err
    assert states(folder) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--xmp", "--engine", "ray", "--csv", "a"], "--xmp works on the machine that has the pictures"),
        (["--watch", "--engine", "ray", "--csv", "a"], "--watch works on the machine that has the pictures"),
        (["--xmp-remove", "--engine", "ray", "--csv", "a"], "--xmp-remove works on the machine"),
        (["--xmp-remove", "--xmp"], "--xmp-remove removes tags and does nothing else"),
        (["--xmp-remove", "--csv", "a.csv"], "--xmp-remove removes tags and does nothing else"),
        (["--xmp-only", "meme"], "add --xmp"),
        (["--xmp-tag", "Mine"], "add --xmp"),
        (["--xmp-style", "lightroom"], "add --xmp"),
        (["--xmp", "--xmp-tag", "a||b"], "--xmp-tag: each level of a tag needs a visible character"),
        (["--xmp", "--xmp-only", "cat"], "invalid choice"),
        (["--watch", "--parquet", "a.parquet"], "with --watch, use --csv or --json"),
        (["--watch", "--csv", "a.csv", "--json", "-"], "all tables are files"),
        (["missing", "--watch"], "--watch needs folders; missing is none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, classify.main, None, ".", *options)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "package", "module"),
    [
        ("--xmp", "lxml", "photo_library.xmp"),
        ("--xmp-remove", "lxml", "photo_library.xmp"),
        ("--watch", "watchfiles", "photo_library.watch"),
    ],
)
def test_who_lacks_a_package_reads_how_to_get_it(
    *,
    option: str,
    package: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in (module, "photo_library.sidecars"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert run(monkeypatch, classify.main, None, tmp_path, option) == 2
    assert capsys.readouterr().err == (
        f"classify.py: error: {package} is missing: pip install -r requirements-library.txt\n"
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(watch, "TICK_MILLISECONDS", 50)


def until(holds: Callable[[], bool]) -> None:
    """Wait for another thread's work."""
    end = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class FolderEditor(threading.Thread):
    """Changes a folder while it is being watched, and stops the watch at the end."""

    def __init__(self, steps: Callable[[], None], stop_with: int) -> None:
        super().__init__()
        self.steps = steps
        self.stop_with = stop_with
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Do the steps, then send the signal whatever became of them."""
        try:
            self.steps()
        except BaseException as error:  # raised again in the test's own thread
            self.failure = error
        os.kill(os.getpid(), self.stop_with)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("stop_with", [signal.SIGINT, signal.SIGTERM])
def test_watching_answers_what_comes_changes_and_comes_back(
    *,
    stop_with: signal.Signals,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    classify_tiny: Command,
) -> None:
    table = folder / "a.csv"
    one = folder / "meme" / "one"

    def verdicts() -> dict[str, str]:
        return {row["path"]: row["verdict"] or row["error"] for row in rows_of(table)} if table.exists() else {}

    def probability(path: Path) -> str:
        return next((row["meme_probability"] for row in rows_of(table) if row["path"] == str(path)), "")

    def steps() -> None:
        until(lambda: len(verdicts()) == 16)
        (folder / "album").mkdir()
        (folder / "album" / "new.png").write_bytes(encode(noise(60, 60, 3)))
        until(lambda: str(folder / "album" / "new.png") in verdicts())
        half = encode(noise(90, 60, 4))
        (one / "half.png").write_bytes(half[: len(half) // 2])
        until(lambda: str(one / "half.png") in verdicts())  # a download that hangs: the row says what is wrong
        (one / "half.png").write_bytes(half)
        until(lambda: verdicts().get(str(one / "half.png")) in LEAVES)
        before = probability(one / "half.png")
        older = tmp_path / "older.png"
        older.write_bytes(encode(noise(90, 60, 6)))
        os.utime(older, (0, 0))
        older.replace(one / "half.png")  # as a backup does
        until(lambda: probability(one / "half.png") not in (before, ""))
        shutil.move(one, tmp_path / "away")
        (tmp_path / "away" / "late.png").write_bytes(encode(noise(60, 60, 5)))
        shutil.move(tmp_path / "away", one)
        until(lambda: str(one / "late.png") in verdicts())
        (folder / ".hidden").mkdir()
        shutil.copy(one / "late.png", folder / ".hidden")
        shutil.copy(one / "late.png", folder / "last.png")
        until(lambda: (folder / "last.png.xmp").exists() and str(folder / "last.png") in verdicts())

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    editor = FolderEditor(steps, stop_with)
    editor.start()
    options = ("--csv", table, "--copy-to", folder / "sorted", "--xmp", "--watch")
    code = classify_tiny(folder, *options)
    editor.join()
    if editor.failure:
        raise editor.failure
    assert code == 0
    assert "Stopped watching." in capsys.readouterr().err
    assert [signal.getsignal(number) for number in handlers] == list(handlers.values())
    pictures = [path for path in find_pictures(folder) if folder / "sorted" not in path.parents]
    assert len(pictures) == 20
    assert sorted(row["path"] for row in rows_of(table)) == sorted(map(str, pictures))  # each once, and no copy
    assert all(path.with_name(path.name + ".xmp").exists() for path in pictures)
    assert classify_tiny(folder, *options[:-1]) == 0
    assert "20 of 20 pictures were classified before" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_stop_in_the_middle_of_a_batch_leaves_whole_rows(
    *, kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    table = tmp_path / f"a.{kind}"
    first, classify_and_save = find_pictures(folder), classify.classify_and_save

    def later(*_arguments: object) -> Iterator[list[Path]]:
        for number in range(40):
            shutil.copy(first[0], folder / f"new{number}.png")
        yield sorted(folder.glob("new*.png"))
        pytest.fail("the watch went on")

    def stopped(job: classify.Job, paths: list[Path]) -> Iterator[Any]:
        for number, result in enumerate(classify_and_save(job, paths)):
            if len(paths) == 40 and number == 25:
                os.kill(os.getpid(), signal.SIGTERM)
            yield result

    monkeypatch.setattr(watch, "watch_pictures", later)
    with monkeypatch.context() as stop:
        stop.setattr(classify, "classify_and_save", stopped)
        assert classify_tiny(folder, f"--{kind}", table, "--watch") == 0
    rows = list(READERS[kind](table))
    assert len(rows) == 16 + 25
    assert classify_tiny(folder, f"--{kind}", table) == 0
    assert [row.path for row in READERS[kind](table)][:41] == [row.path for row in rows]
    assert sorted(row.path for row in READERS[kind](table)) == sorted(map(str, find_pictures(folder)))


@pytest.mark.usefixtures("quick")
def test_what_vanishes_before_it_is_opened_has_no_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    gone, new = folder / "gone.png", folder / "new.png"

    def later(*_arguments: object) -> Iterator[list[Path]]:
        new.write_bytes(encode(noise(60, 60, 3)))
        yield [gone, new]
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch_pictures", later)
    assert classify_tiny(folder, "--csv", tmp_path / "a.csv", "--watch") == 0
    paths = {row["path"] for row in rows_of(tmp_path / "a.csv")}
    assert (str(gone) in paths, str(new) in paths, len(paths)) == (False, True, 17)


@pytest.mark.usefixtures("quick")
def test_a_table_of_an_earlier_watch_is_gone_on_with_when_a_drive_comes_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    table = tmp_path / "a.csv"
    arguments = (folder, "--csv", table, "--watch")
    drive, away = folder / "meme", tmp_path / "away"

    def later(*_arguments: object) -> Iterator[list[Path]]:
        if away.exists():
            shutil.move(away, drive)
            yield find_pictures(drive)
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch_pictures", later)
    assert classify_tiny(*arguments) == 0
    before = rows_of(table)
    shutil.move(drive, away)
    assert classify_tiny(*arguments) == 0
    assert sorted(row["path"] for row in rows_of(table)) == sorted(row["path"] for row in before)
