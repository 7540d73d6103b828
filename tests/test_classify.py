import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from commands import run
from pictures import ROOT, encode, noise
from PIL import ImageOps
from torch import Tensor

import classify
from gradcam import explain, overlay
from images import BadImage, open_picture
from model import Classifier
from tables import READERS


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_files_and_folders_become_rows_in_order(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = tmp_path / "single.png"
    single.write_bytes(encode(noise(60, 60, 9)))
    out = tmp_path / "out.csv"
    assert run(monkeypatch, classify.main, tiny_classifier, single, folder, "--csv", out) == 0
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "label", "meme_probability", "verdict", "error", "checkpoint"]
    assert [row["path"] for row in rows] == [str(single), *map(str, sorted(folder.rglob("*.png")))]
    for row in rows:
        (expected,) = tiny_classifier.predict([open_picture(row["path"])])
        assert (row["label"], row["verdict"], row["error"]) == (expected.label, expected.verdict, "")
        assert float(row["meme_probability"]) == pytest.approx(expected.meme_probability, abs=1e-4)


def test_bad_files_are_rows_and_stop_nothing(
    folder: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "meme" / "one" / "1.png").write_bytes(b"no picture")
    missing = tmp_path / "missing.png"
    out = tmp_path / "out.csv"
    assert run(monkeypatch, classify.main, tiny_classifier, folder, missing, "--csv", out) == 1
    rows = rows_of(out)
    assert len(rows) == 17
    bad = {row["path"]: row["error"] for row in rows if row["error"]}
    assert set(bad) == {str(folder / "meme" / "one" / "1.png"), str(missing)}
    assert bad[str(missing)] == "There is no such file."
    assert all(row["label"] == row["meme_probability"] == row["verdict"] == "" for row in rows if row["error"])
    assert "15 pictures classified, 2 files failed" in capsys.readouterr().err


def test_without_a_file_the_table_goes_to_standard_output(
    folder: Path, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, classify.main, tiny_classifier, folder) == 0
    assert capsys.readouterr().out.splitlines()[0] == "path,label,meme_probability,verdict,error,checkpoint"


def test_names_are_no_formulas_and_survive(
    tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Path("=HYPERLINK(1).png"), Path('a,"b"\n.png'), Path("caf\udce9.png")]  # the last is Latin-1
    for name in names:
        name.write_bytes(encode(noise(50, 50)))
    assert run(monkeypatch, classify.main, tiny_classifier, *names, "--csv", "out.csv") == 0
    assert [row["path"] for row in rows_of(Path("out.csv"))] == ["'=HYPERLINK(1).png", *map(str, names[1:])]
    # On a console that is strict about UTF-8.
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="utf-8"))
    assert run(monkeypatch, classify.main, tiny_classifier, names[2]) == 0
    sys.stdout.seek(0)
    assert "caf\udce9.png" in sys.stdout.read()


def test_paths_that_no_system_call_takes_are_rows(
    tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    assert run(monkeypatch, classify.main, tiny_classifier, "a" * 300 + ".png", "--csv", out) == 1
    assert rows_of(out)[0]["error"] == "This file cannot be read: File name too long."


def test_the_table_never_replaces_a_picture(
    folder: Path, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = folder / "meme" / "one" / "0.png"
    before = picture.read_bytes()
    table = folder / "meme" / ".." / "meme" / "one" / "0.png"
    assert run(monkeypatch, classify.main, tiny_classifier, folder, "--csv", table) == 2
    assert "is one of the pictures" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required"),
        ([".", "--csv", "/dev/null/out.csv"], "/dev/null cannot be written"),
        ([".", "--csv", "a.csv", "--copy-to", "/dev/null"], "/dev/null cannot be written"),
        ([".", "--csv", "new", "--json", "./new"], "two tables cannot be one file"),
        ([".", "--checkpoint", "missing.pth"], "make one with `python -m training.train`"),
    ],
)
def test_wrong_usage_exits_with_2_before_any_work(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:  # of argparse, or as at the end of classify.py
        sys.exit(run(monkeypatch, classify.main, None, *arguments))
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_who_has_no_ray_reads_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "cluster", raising=False)
    assert run(monkeypatch, classify.main, None, tmp_path, "--engine", "ray", "--csv", tmp_path / "table") == 2
    assert capsys.readouterr().err == ("classify.py: error: ray is missing: pip install -r requirements-cluster.txt\n")


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

    found = list(classify.classify_batches(tiny_classifier, paths, slow_at_first))
    assert [path for path, _ in found] == paths
    assert next(batches) == math.ceil(len(paths) / classify.BATCH) > 4
    for path, answer in found:
        if isinstance(answer, BadImage):
            assert path.read_bytes() == b"no picture"
        else:
            (inputs,) = tiny_classifier.preprocess([open_picture(path)])
            assert answer == pytest.approx(float(inputs.mean()), abs=1e-5)


def test_patterns_and_lists_name_pictures(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert (
        run(monkeypatch, classify.main, tiny_classifier, "**/one/*.png", "meme/one", "--csv", tmp_path / "a.csv") == 0
    )
    ones = [f"meme/one/{n}.png" for n in range(4)]
    assert [row["path"] for row in rows_of(tmp_path / "a.csv")] == ones
    Path("loop").symlink_to(".")
    Path("meme/one/link.png").symlink_to("0.png")
    assert classify.find("**/one/*.png") == [Path(name) for name in (*ones, "meme/one/link.png")]
    found = classify.find("**")  # matches folders, too, the loop among them
    assert len(found) == len({path.resolve() for path in found}) + 1 == 17  # once more under the link's name
    Path("loop").unlink()
    Path("meme/one/link.png").unlink()
    Path("bracket[1].png").write_bytes(encode(noise(50, 50)))  # a name, though it looks like a pattern
    listed = b"bracket[1].png\nmeme/two\r\n\nmissing.png\n"
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(listed)))
    assert run(monkeypatch, classify.main, tiny_classifier, "-", "--csv", tmp_path / "b.csv") == 1
    expected = ["bracket[1].png", *(f"meme/two/{n}.png" for n in range(4)), "missing.png"]
    assert [row["path"] for row in rows_of(tmp_path / "b.csv")] == expected
    Path("two\nlines.png").write_bytes(encode(noise(50, 50)))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"two\nlines.png\0meme/two\0")))  # find -print0
    assert run(monkeypatch, classify.main, tiny_classifier, "-", "--csv", tmp_path / "c.csv") == 0
    assert [row["path"] for row in rows_of(tmp_path / "c.csv")] == ["two\nlines.png", *expected[1:-1]]


def duplicates(files: dict[Path, bytes]) -> int:
    """How many files have the name and the content of another one."""
    return len(files) - len({(path.name, content) for path, content in files.items()})


def test_copies_are_sorted_by_verdict_and_overwrite_nothing(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copies = tmp_path / "out.csv", tmp_path / "sorted"
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    for verdict in ("meme", "not_meme", "not_sure"):
        (copies / verdict).mkdir(parents=True)
        (copies / verdict / "0.png").write_bytes(b"mine")
    arguments = (folder, "--csv", out, "--copy-to", copies)
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
    first = {copy: copy.stat().st_mtime_ns for copy in copies.rglob("*.*")}
    for again in (True, False):  # whether the table is still there: all copies are
        assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
        assert {copy: copy.stat().st_mtime_ns for copy in copies.rglob("*.*")} == first
        if again:
            out.unlink()
    assert {path: path.read_bytes() for path in folder.rglob("*.png")} == before
    for path, content in before.items():
        verdict = tiny_classifier.predict([open_picture(path)])[0].verdict
        assert [copy for copy in (copies / verdict).iterdir() if copy.read_bytes() == content]
    copied = [copy.read_bytes() for copy in copies.rglob("*.png")]
    assert copied.count(b"mine") == 3
    assert len(copied) == 3 + 16 - duplicates(before)
    assert sorted({*copied} - {b"mine"}) == sorted({*before.values()})


def test_overlays_lie_in_folders_like_the_pictures_own(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder / "meme")
    (folder / "meme" / "one" / "2.png").write_bytes(b"no picture")
    overlays = tmp_path / "overlays"
    arguments = ("one", "../not_meme/four", "--csv", tmp_path / "o.csv", "--overlays", overlays)
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 1
    names = [f"not_meme/four/{n}.png.png" for n in range(4)] + [f"one/{n}.png.png" for n in (0, 1, 3)]
    assert sorted(path.relative_to(overlays).as_posix() for path in overlays.rglob("*.png")) == sorted(names)
    picture = open_picture(folder / "meme" / "one" / "0.png")
    (explanation,) = explain(tiny_classifier, [picture])
    expected = overlay(picture, explanation.heat[explanation.prediction.label])
    assert open_picture(overlays / "one" / "0.png.png").tobytes() == expected.tobytes()


def test_an_overlay_of_a_framed_picture_is_the_pages(
    tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = ImageOps.expand(noise(320, 320, 3), (0, 160, 0, 160), "black")
    picture.save("screen.png")
    assert run(monkeypatch, classify.main, tiny_classifier, "screen.png", "--csv", "o.csv", "--overlays", "over") == 0
    (explanation,) = explain(tiny_classifier, [picture])
    expected = overlay(picture, explanation.heat[explanation.prediction.label])
    assert open_picture("over/screen.png.png").tobytes() == expected.tobytes()


def test_outputs_among_the_pictures_are_not_looked_at(
    folder: Path, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    arguments = (".", "--csv", "a.csv", "--copy-to", "sorted", "--overlays", "meme/heat")
    for _ in range(2):
        assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
        assert len(rows_of(Path("a.csv"))) == 16
        assert len(list(Path("meme/heat").rglob("*.png"))) == 16


def test_copies_and_overlays_may_go_where_the_pictures_are(
    folder: Path,
    tiny_classifier: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """But for folders that are named like a verdict, where copies go."""
    monkeypatch.chdir(folder)
    Path("meme").rename("mine")
    for name in ("a.csv", "b.csv"):
        arguments = ("mine", "--csv", name, "--copy-to", "mine", "--overlays", ".")
        assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
        assert [row["path"] for row in rows_of(Path(name))] == [
            f"mine/{o}/{n}.png" for o in ("one", "two") for n in range(4)
        ]
    assert "pictures in the folders for copies and heatmaps are left out" in capsys.readouterr().err
    assert len(list(Path("mine/one").glob("*.png.png"))) == 4


def test_without_hard_links_copies_are_whole_and_overwrite_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on memory sticks and some networks."""

    def refused(_self: Path, _target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    like = tmp_path / "like"
    like.touch()
    os.utime(like, (1, 1))
    for content in (b"one", b"two", b"one"):
        classify.save_new(tmp_path / "to" / "a.png", content, like=like)
    assert {p.name: p.read_bytes() for p in (tmp_path / "to").iterdir()} == {"a.png": b"one", "a_2.png": b"two"}
    assert (tmp_path / "to" / "a_2.png").stat().st_mtime == 1


def test_a_copy_that_fails_later_stops_nothing(
    folder: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = sorted((folder / "meme" / "one").iterdir())
    arguments: tuple[str | Path, ...] = (*paths, "--csv", tmp_path / "a.csv")
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
    paths[0].unlink()
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments, "--copy-to", tmp_path / "sorted") == 1
    assert f"{paths[0]}: Its copy or heatmap cannot be saved: No such file or directory." in capsys.readouterr().err
    assert len(list((tmp_path / "sorted").rglob("*.png"))) == 3


def test_only_what_can_be_gone_on_with_is_said_to_go_on(
    folder: Path,
    tiny_classifier: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(classify, "run", stopped)
    asked: tuple[tuple[list[str], str], ...] = (
        ([], "Stopped.\n"),
        (["--csv", "a.csv"], "Stopped. The same command goes on from here.\n"),
    )
    for options, said in asked:
        assert run(monkeypatch, classify.main, tiny_classifier, folder, *options) == 130
        assert capsys.readouterr().err == said


def test_copies_and_overlays_can_be_asked_for_later(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (folder, "--csv", tmp_path / "a.csv")
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
    before = (tmp_path / "a.csv").read_bytes()
    more = ("--copy-to", tmp_path / "sorted", "--overlays", tmp_path / "heat")
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments, *more) == 0
    assert (tmp_path / "a.csv").read_bytes() == before
    assert len(list((tmp_path / "heat").rglob("*.png"))) == 16
    assert {copy.read_bytes() for copy in (tmp_path / "sorted").rglob("*.png")} == {
        path.read_bytes() for path in folder.rglob("*.png")
    }


def test_a_picture_that_cannot_be_saved_stops_nothing(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = folder / "meme" / "one" / ("x" * 250 + ".png")
    long.write_bytes(encode(noise(50, 50)))
    arguments = (folder, "--csv", tmp_path / "a.csv", "--overlays", tmp_path / "heat")
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 1
    bad = [row for row in rows_of(tmp_path / "a.csv") if row["error"]]
    assert [row["path"] for row in bad] == [str(long)]
    assert bad[0]["error"] == "Its copy or heatmap cannot be saved: File name too long."
    (seen,) = tiny_classifier.predict([open_picture(long)])  # the answer is there all the same
    assert (bad[0]["label"], bad[0]["verdict"]) == (seen.label, seen.verdict)
    assert float(bad[0]["meme_probability"]) == pytest.approx(seen.meme_probability, abs=1e-4)
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 1  # and it is tried again, alone
    assert len(list((tmp_path / "heat").rglob("*.png"))) == 16
    assert not list((tmp_path / "heat").rglob("*.partial"))


def test_failed_files_are_tried_again(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = folder / "meme" / "one" / "1.png"
    content = bad.read_bytes()
    bad.write_bytes(b"no picture")
    arguments = (folder, "--csv", tmp_path / "a.csv")
    for _ in range(2):
        assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 1
        assert len(rows_of(tmp_path / "a.csv")) == 16
    bad.write_bytes(content)
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
    assert not any(row["error"] for row in rows_of(tmp_path / "a.csv"))


def test_a_run_that_is_refused_changes_no_table(
    tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, notes = tmp_path / "a.csv", tmp_path / "b.json"
    assert run(monkeypatch, classify.main, tiny_classifier, tmp_path / "gone.png", "--csv", table) == 1
    before = table.read_bytes()
    notes.write_text("my notes")
    arguments = (tmp_path / "gone.png", "--csv", table, "--json", notes)
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 2
    assert (table.read_bytes(), notes.read_text()) == (before, "my notes")


def test_who_stops_early_does_not_wait_for_what_has_not_begun() -> None:
    begun = []

    def work(item: int) -> int:
        time.sleep(0.05)
        begun.append(item)
        return item

    with ThreadPoolExecutor(1) as pool:
        results = classify.map_in_order(pool, work, itertools.count(), ahead=20)
        assert next(results) == 0
        results.close()
    assert len(begun) <= 3


def start_slowly(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start classify.py with a slow network in a process of its own, for a test to stop."""
    command = [sys.executable, str(ROOT / "tests" / "slow_classify.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    signal.signal(signal.SIGINT, before)
    return process


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of 300 pictures: 19 batches."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number:03}.png").write_bytes(encode(noise(40, 30, number % 10)))
    return folder


def test_ctrl_c_leaves_a_table_to_resume(
    many: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a real process, its threads and a real signal."""
    out, copies = tmp_path / "out.parquet", tmp_path / "sorted"
    arguments = (many, "--parquet", out, "--copy-to", copies)
    first = start_slowly(*arguments)
    while (copied := len(list(copies.rglob("*.png")))) < 45:  # the rows come some 30 pictures later
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    _, said = first.communicate()
    assert first.returncode == 130, f"{copied} copied when it was stopped: {said}"
    assert "Stopped. The same command goes on from here." in said
    assert "Traceback" not in said
    before = list(READERS["parquet"](out))
    assert 0 < len(before) < 300
    assert not list(tmp_path.rglob("*.partial"))
    assert run(monkeypatch, classify.main, tiny_classifier, *arguments) == 0
    assert f"{len(before)} of 300 pictures were answered before" in capsys.readouterr().err
    rows = list(READERS["parquet"](out))
    assert [row.path for row in rows] == [str(path) for path in sorted(many.iterdir())]
    assert rows[: len(before)] == before
    assert len(list(copies.rglob("*.png"))) == 300


def test_a_killed_run_is_resumed(
    many: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a real process that has no chance to tidy up."""
    out = tmp_path / "out.csv"
    first = start_slowly(many, "--csv", out)
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.communicate()
    before = rows_of(out)
    assert len(before) < 300
    with out.open("a") as file:
        file.write("/half/a/ro")  # as if a row had been cut off
    assert run(monkeypatch, classify.main, tiny_classifier, many, "--csv", out) == 0
    assert f"{len(before)} of 300 pictures were answered before" in capsys.readouterr().err
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [str(path) for path in sorted(many.iterdir())]
    assert rows[: len(before)] == before


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_second_run_goes_on_where_the_first_stopped(
    *,
    kind: str,
    folder: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"out.{kind}"
    real, answered = classify.classify_and_save, []

    def interrupted(*arguments: Any) -> Iterator[Any]:
        for number, answer in enumerate(real(*arguments)):
            if number == 6:
                raise KeyboardInterrupt
            answered.append(answer[0])
            yield answer

    with monkeypatch.context() as once:
        once.setattr(classify, "classify_and_save", interrupted)
        assert run(once, classify.main, tiny_classifier, folder, f"--{kind}", out) == 130
    read = READERS[kind]
    assert [row.path for row in read(out)] == [str(path) for path in answered]
    assert run(monkeypatch, classify.main, tiny_classifier, folder, f"--{kind}", out) == 0
    assert "6 of 16 pictures were answered before" in capsys.readouterr().err
    assert [row.path for row in read(out)] == [str(path) for path in sorted(folder.rglob("*.png"))]
    assert run(monkeypatch, classify.main, tiny_classifier, folder, f"--{kind}", out) == 0
    assert len(list(read(out))) == 16
