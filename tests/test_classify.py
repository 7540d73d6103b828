import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from commands import Command, rows_of, run
from pictures import ROOT, encode, noise
from PIL import Image, ImageOps

import classify
from gradcam import explain, overlay
from images import PictureSearch, open_picture
from model import Classifier
from photo_library.copies import OVERLAY, NewFiles, overlay_path
from tables import READERS, lock_tables


def test_files_and_folders_become_rows_in_order(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, classify_tiny: Command
) -> None:
    single = tmp_path / "single.png"
    single.write_bytes(encode(noise(60, 60, 9)))
    out = tmp_path / "out.csv"
    assert classify_tiny(single, folder, "--csv", out) == 0
    rows = rows_of(out)
    assert list(rows[0]) == ["path", "label", "meme_probability", "verdict", "error", "checkpoint"]
    assert [row["path"] for row in rows] == [str(single), *map(str, sorted(folder.rglob("*.png")))]
    for row in rows:
        (expected,) = tiny_classifier.predict([open_picture(row["path"])])
        assert (row["label"], row["verdict"], row["error"]) == (expected.label, expected.verdict, "")
        assert float(row["meme_probability"]) == pytest.approx(expected.meme_probability, abs=1e-4)


def test_a_warning_goes_to_standard_error_and_its_picture_counts_as_classified(
    tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short, fading, out = tmp_path / "short.jpg", tmp_path / "fading.gif", tmp_path / "out.csv"
    short.write_bytes(encode(noise(320, 320), "JPEG", restart_marker_rows=1).rpartition(b"\xff\xd2")[0])
    frames = [Image.new("RGB", (60, 60), "black"), noise(60, 60), noise(60, 60, 1)]
    fading.write_bytes(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    (tmp_path / "whole.png").write_bytes(encode(noise(60, 60)))
    assert run(monkeypatch, classify.main, tiny_classifier, tmp_path, "--csv", out) == 0
    assert [row["error"] for row in rows_of(out)] == ["", "", ""]
    assert sorted(line for line in capsys.readouterr().err.splitlines() if line.startswith(str(tmp_path))) == [
        f"{fading}: Frame 2 of this animation was classified, because those before it show only one colour.",
        f"{short}: The last 5% of this picture is missing, because its file ends early.",
    ]


def test_bad_files_are_rows_and_stop_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    (folder / "meme" / "one" / "1.png").write_bytes(b"no picture")
    missing = tmp_path / "missing.png"
    out = tmp_path / "out.csv"
    assert classify_tiny(folder, missing, "--csv", out) == 1
    rows = rows_of(out)
    assert len(rows) == 17
    bad = {row["path"]: row["error"] for row in rows if row["error"]}
    assert set(bad) == {str(folder / "meme" / "one" / "1.png"), str(missing)}
    assert bad[str(missing)] == "There is no such file."
    assert all(row["label"] == row["meme_probability"] == row["verdict"] == "" for row in rows if row["error"])
    assert "15 pictures classified, 2 files failed" in capsys.readouterr().err


def test_without_a_file_the_table_goes_to_standard_output(
    folder: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    assert classify_tiny(folder) == 0
    assert capsys.readouterr().out.splitlines()[0] == "path,label,meme_probability,verdict,error,checkpoint"


def test_names_are_no_formulas_and_survive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [Path("=HYPERLINK(1).png"), Path('a,"b"\n.png'), Path("caf\udce9.png")]  # the last is Latin-1
    for name in names:
        name.write_bytes(encode(noise(50, 50)))
    assert classify_tiny(*names, "--csv", "out.csv") == 0
    assert [row["path"] for row in rows_of(Path("out.csv"))] == ["'=HYPERLINK(1).png", *map(str, names[1:])]
    # On a console that is strict about UTF-8.
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BytesIO(), encoding="utf-8"))
    assert classify_tiny(names[2]) == 0
    sys.stdout.seek(0)
    assert "caf\udce9.png" in sys.stdout.read()


def test_paths_that_no_system_call_takes_are_rows(tmp_path: Path, classify_tiny: Command) -> None:
    out = tmp_path / "out.csv"
    assert classify_tiny("a" * 300 + ".png", "--csv", out) == 1
    assert rows_of(out)[0]["error"] == "This file cannot be read: File name too long."


def test_the_table_never_replaces_a_picture(
    folder: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    picture = folder / "meme" / "one" / "0.png"
    before = picture.read_bytes()
    table = folder / "meme" / ".." / "meme" / "one" / "0.png"
    assert classify_tiny(folder, "--csv", table) == 2
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


def test_patterns_and_lists_name_pictures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(folder)
    assert classify_tiny("**/one/*.png", "meme/one", "--csv", tmp_path / "a.csv") == 0
    ones = [f"meme/one/{n}.png" for n in range(4)]
    assert [row["path"] for row in rows_of(tmp_path / "a.csv")] == ones
    Path("loop").symlink_to(".")
    Path("meme/one/link.png").symlink_to("0.png")
    assert classify.expand_path("**/one/*.png") == [Path(name) for name in (*ones, "meme/one/link.png")]
    found = classify.expand_path("**")  # matches folders, too, the loop among them
    assert len(found) == len({path.resolve() for path in found}) + 1 == 17  # once more under the link's name
    Path("loop").unlink()
    Path("meme/one/link.png").unlink()
    Path("bracket[1].png").write_bytes(encode(noise(50, 50)))  # a name, though it looks like a pattern
    listed = b"bracket[1].png\nmeme/two\r\n\nmissing.png\n"
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(listed)))
    assert classify_tiny("-", "--csv", tmp_path / "b.csv") == 1
    expected = ["bracket[1].png", *(f"meme/two/{n}.png" for n in range(4)), "missing.png"]
    assert [row["path"] for row in rows_of(tmp_path / "b.csv")] == expected
    Path("two\nlines.png").write_bytes(encode(noise(50, 50)))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"two\nlines.png\0meme/two\0")))  # find -print0
    assert classify_tiny("-", "--csv", tmp_path / "c.csv") == 0
    assert [row["path"] for row in rows_of(tmp_path / "c.csv")] == ["two\nlines.png", *expected[1:-1]]


def duplicates(files: dict[Path, bytes]) -> int:
    """How many files have the name and the content of another one."""
    return len(files) - len({(path.name, content) for path, content in files.items()})


def test_copies_are_sorted_by_verdict_and_overwrite_nothing(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, classify_tiny: Command
) -> None:
    out, copies = tmp_path / "out.csv", tmp_path / "sorted"
    before = {path: path.read_bytes() for path in folder.rglob("*.png")}
    for verdict in ("meme", "not_meme", "not_sure"):
        (copies / verdict).mkdir(parents=True)
        (copies / verdict / "0.png").write_bytes(b"mine")
    arguments = (folder, "--csv", out, "--copy-to", copies)
    assert classify_tiny(*arguments) == 0
    first = {copy: copy.stat().st_mtime_ns for copy in copies.rglob("*.*")}
    for again in (True, False):  # whether the table is still there: all copies are
        assert classify_tiny(*arguments) == 0
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
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(folder / "meme")
    (folder / "meme" / "one" / "2.png").write_bytes(b"no picture")
    overlays = tmp_path / "overlays"
    arguments = ("one", "../not_meme/four", "--csv", tmp_path / "o.csv", "--overlays", overlays)
    assert classify_tiny(*arguments) == 1
    names = [f"not_meme/four/{n}.png.png" for n in range(4)] + [f"one/{n}.png.png" for n in (0, 1, 3)]
    assert sorted(path.relative_to(overlays).as_posix() for path in overlays.rglob("*.png")) == sorted(names)
    picture = open_picture(folder / "meme" / "one" / "0.png")
    (explanation,) = explain(tiny_classifier, [picture])
    expected = overlay(picture, explanation.heat[explanation.prediction.label])
    assert open_picture(overlays / "one" / "0.png.png").tobytes() == expected.tobytes()


def test_an_overlay_of_a_framed_picture_is_the_pages(
    tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = ImageOps.expand(noise(320, 320, 3), (0, 160, 0, 160), "black")
    picture.save("screen.png")
    assert classify_tiny("screen.png", "--csv", "o.csv", "--overlays", "over") == 0
    (explanation,) = explain(tiny_classifier, [picture])
    expected = overlay(picture, explanation.heat[explanation.prediction.label])
    assert open_picture("over/screen.png.png").tobytes() == expected.tobytes()


def test_outputs_among_the_pictures_are_not_classified(
    folder: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(folder)
    arguments = (".", "--csv", "a.csv", "--copy-to", "sorted", "--overlays", "meme/heat")
    for _ in range(2):
        assert classify_tiny(*arguments) == 0
        assert len(rows_of(Path("a.csv"))) == 16
        assert len(list(Path("meme/heat").rglob("*.png"))) == 16


def test_copies_and_overlays_may_go_where_the_pictures_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    """But for folders that are named like a verdict, where copies go."""
    monkeypatch.chdir(folder)
    Path("meme").rename("mine")
    for name in ("a.csv", "b.csv"):
        arguments = ("mine", "--csv", name, "--copy-to", "mine", "--overlays", ".")
        assert classify_tiny(*arguments) == 0
        assert [row["path"] for row in rows_of(Path(name))] == [
            f"mine/{o}/{n}.png" for o in ("one", "two") for n in range(4)
        ]
    assert "pictures in the folders for copies and heatmaps skipped" in capsys.readouterr().err
    assert len(list(Path("mine/one").glob("*.png.png"))) == 4


def test_a_copy_that_fails_later_stops_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    paths = sorted((folder / "meme" / "one").iterdir())
    arguments: tuple[str | Path, ...] = (*paths, "--csv", tmp_path / "a.csv")
    assert classify_tiny(*arguments) == 0
    paths[0].unlink()
    assert classify_tiny(*arguments, "--copy-to", tmp_path / "sorted") == 1
    assert f"{paths[0]}: Its copy or heatmap cannot be saved: No such file or directory." in capsys.readouterr().err
    assert len(list((tmp_path / "sorted").rglob("*.png"))) == 3


def test_only_a_run_that_can_be_resumed_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    def stopped(*_arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(classify, "run", stopped)
    asked: tuple[tuple[list[str], str], ...] = (
        ([], "Stopped.\n"),
        (["--csv", "-"], "Stopped.\n"),
        (["--csv", "a.csv"], "Stopped. Run the same command again to resume.\n"),
    )
    for options, said in asked:
        assert classify_tiny(folder, *options) == 130
        assert capsys.readouterr().err == said


def test_copies_and_overlays_can_be_asked_for_later(folder: Path, tmp_path: Path, classify_tiny: Command) -> None:
    arguments = (folder, "--csv", tmp_path / "a.csv")
    assert classify_tiny(*arguments) == 0
    before = (tmp_path / "a.csv").read_bytes()
    more = ("--copy-to", tmp_path / "sorted", "--overlays", tmp_path / "heat")
    assert classify_tiny(*arguments, *more) == 0
    assert (tmp_path / "a.csv").read_bytes() == before
    assert len(list((tmp_path / "heat").rglob("*.png"))) == 16
    assert {copy.read_bytes() for copy in (tmp_path / "sorted").rglob("*.png")} == {
        path.read_bytes() for path in folder.rglob("*.png")
    }


def test_a_picture_that_cannot_be_saved_stops_nothing(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(folder)
    alone = Path("alone", "1.png")
    alone.parent.mkdir()
    alone.write_bytes(encode(noise(50, 50)))
    (tmp_path / "heat").mkdir()
    (tmp_path / "heat" / "alone").touch()  # where the folder of its heatmap would be
    arguments = (".", "--csv", tmp_path / "a.csv", "--overlays", tmp_path / "heat")
    assert classify_tiny(*arguments) == 1
    bad = [row for row in rows_of(tmp_path / "a.csv") if row["error"]]
    assert [row["path"] for row in bad] == [str(alone)]
    assert bad[0]["error"] == "Its copy or heatmap cannot be saved: File exists."
    (seen,) = tiny_classifier.predict([open_picture(alone)])  # the answer is there all the same
    assert (bad[0]["label"], bad[0]["verdict"]) == (seen.label, seen.verdict)
    assert float(bad[0]["meme_probability"]) == pytest.approx(seen.meme_probability, abs=1e-4)
    assert classify_tiny(*arguments) == 1  # and it is tried again, alone
    assert len(list((tmp_path / "heat").rglob("*.png"))) == 16
    assert not list((tmp_path / "heat").rglob("*.partial"))


def test_failed_files_are_tried_again(folder: Path, tmp_path: Path, classify_tiny: Command) -> None:
    bad = folder / "meme" / "one" / "1.png"
    content = bad.read_bytes()
    bad.write_bytes(b"no picture")
    arguments = (folder, "--csv", tmp_path / "a.csv")
    for _ in range(2):
        assert classify_tiny(*arguments) == 1
        assert len(rows_of(tmp_path / "a.csv")) == 16
    bad.write_bytes(content)
    assert classify_tiny(*arguments) == 0
    assert not any(row["error"] for row in rows_of(tmp_path / "a.csv"))


def test_a_run_that_is_refused_changes_no_table(tmp_path: Path, classify_tiny: Command) -> None:
    table, notes = tmp_path / "a.csv", tmp_path / "b.json"
    assert classify_tiny(tmp_path / "gone.png", "--csv", table) == 1
    before = table.read_bytes()
    notes.write_text("my notes")
    arguments = (tmp_path / "gone.png", "--csv", table, "--json", notes)
    assert classify_tiny(*arguments) == 2
    assert (table.read_bytes(), notes.read_text()) == (before, "my notes")


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
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
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
    assert "Stopped. Run the same command again to resume." in said
    assert "Traceback" not in said
    before = list(READERS["parquet"](out))
    assert 0 < len(before) < 300
    assert not list(tmp_path.rglob("*.partial"))
    assert classify_tiny(*arguments) == 0
    assert f"{len(before)} of 300 pictures were classified before" in capsys.readouterr().err
    rows = list(READERS["parquet"](out))
    assert [row.path for row in rows] == [str(path) for path in sorted(many.iterdir())]
    assert rows[: len(before)] == before
    assert len(list(copies.rglob("*.png"))) == 300


def test_a_killed_run_is_resumed(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    """With a real process that has no chance to tidy up."""
    out = tmp_path / "out.csv"
    first = start_slowly(many, "--csv", out)
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert first.poll() is None
        time.sleep(0.02)
    assert classify_tiny(many, "--csv", out) == 2
    assert f"Another run is writing to {out}" in capsys.readouterr().err
    first.kill()
    first.communicate()
    before = rows_of(out)
    assert len(before) < 300
    with out.open("a") as file:
        file.write("/half/a/ro")  # as if a row had been cut off
    assert classify_tiny(many, "--csv", out) == 0
    assert f"{len(before)} of 300 pictures were classified before" in capsys.readouterr().err
    rows = rows_of(out)
    assert [row["path"] for row in rows] == [str(path) for path in sorted(many.iterdir())]
    assert rows[: len(before)] == before


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_second_run_resumes_where_the_first_stopped(
    *,
    kind: str,
    folder: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    classify_tiny: Command,
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
    assert classify_tiny(folder, f"--{kind}", out) == 0
    assert "6 of 16 pictures were classified before" in capsys.readouterr().err
    assert [row.path for row in read(out)] == [str(path) for path in sorted(folder.rglob("*.png"))]
    assert classify_tiny(folder, f"--{kind}", out) == 0
    assert len(list(read(out))) == 16


def touch(folder: Path, *names: str) -> None:
    """Write a tiny picture under each name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(20, 20)))


def names_in(folder: Path, search: PictureSearch | None = None) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in classify.expand_path(str(folder), search)]


LEFT_OUT = (
    *("__MACOSX/._a.jpg", "x/@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/a.jpg", ".Trash-1000/files/a.jpg"),
    *("$RECYCLE.BIN/a.jpg", "$Recycle.Bin/a.jpg", "System Volume Information/a.jpg", ".thumbnails/normal/a.png"),
    *(".stversions/a.jpg", ".git/a.png", "x/y/.hidden/z/a.png", "@Recycle/a.jpg", ".@__thumb/a.jpg"),
)


def test_hidden_and_system_folders_are_searched_only_if_asked(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "x/y/b.png", *LEFT_OUT, "._a.jpg", "x/.b.png")
    search = PictureSearch()
    assert names_in(tmp_path, search) == ["a.jpg", "x/y/b.png"]
    assert len(search.hidden_folders) == len(LEFT_OUT)
    assert search.skipped_files == {str(tmp_path / "._a.jpg"), str(tmp_path / "x/.b.png")}
    assert len(names_in(tmp_path, PictureSearch(include_hidden=True))) == 4 + len(LEFT_OUT)
    for pattern in ("**/*.jpg", "**/*.[jp][pn]g", "**", "*", "**/*"):
        assert set(classify.expand_path(str(tmp_path / pattern))) <= {tmp_path / "a.jpg", tmp_path / "x/y/b.png"}
    for name in (*LEFT_OUT, "._a.jpg"):  # what is named is answered
        assert classify.expand_path(str(tmp_path / name)) == [tmp_path / name]
        folder = (tmp_path / name).parent
        assert tmp_path / name in classify.expand_path(str(folder)) or name.rpartition("/")[2].startswith(".")
    assert classify.expand_path(str(tmp_path / "x/@eaDir/*/*.jpg")) == [tmp_path / LEFT_OUT[1]]


def test_linked_folders_are_searched_once_and_only_if_asked(tmp_path: Path) -> None:
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    touch(photos, "a.jpg", "x/b.jpg")
    touch(elsewhere, "c.jpg")
    for link in ("loop", "x/loop", "x/other_loop"):
        (photos / link).symlink_to(photos)
    (photos / "album").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photos)
    (photos / "self").symlink_to("self")
    (photos / "linked.jpg").symlink_to(elsewhere / "c.jpg")  # a linked picture is no folder
    search = PictureSearch()
    assert names_in(photos, search) == ["a.jpg", "linked.jpg", "x/b.jpg"]
    assert len(search.linked_folders) == 4
    assert names_in(photos, PictureSearch(follow_links=True)) == ["a.jpg", "album/c.jpg", "linked.jpg", "x/b.jpg"]
    assert classify.expand_path(str(photos / "**/*.jpg")) == [
        photos / "a.jpg",
        photos / "linked.jpg",
        photos / "x/b.jpg",
    ]
    assert len(classify.expand_path(str(photos / "**/*.jpg"), PictureSearch(follow_links=True))) == 4
    assert classify.expand_path(str(photos / "album")) == [photos / "album/c.jpg"]


def test_endings_decide_and_content_only_if_asked(tmp_path: Path) -> None:
    endings = ["jpg", "JPE", "jfif", "pjpeg", "PJP", "png", "APNG", "webp", "gif", "bmp", "avif", "avifs", "heic"]
    endings += ["heics", "heif", "HEIFS", "HIF", "hif"]
    touch(tmp_path, *(f"{n}.{ending}" for n, ending in enumerate(endings)))
    touch(tmp_path, "jpg", "no_ending", "backup.jpg.old")
    (tmp_path / "notes.txt").write_text("BMW, GIF and PNG\n")
    (tmp_path / "bmw").write_text("BMW, or not BMW, that is the question")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    search = PictureSearch()
    assert len(names_in(tmp_path, search)) == len(endings)
    assert len(search.skipped_files) == 7
    search = PictureSearch(all_files=True)
    found = names_in(tmp_path, search)
    assert len(found) == len(endings) + 3
    assert {"jpg", "no_ending", "backup.jpg.old"} <= set(found)
    for file_format in ("JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"):
        (tmp_path / "no_ending").write_bytes(encode(noise(20, 20), file_format))
        assert "no_ending" in names_in(tmp_path, PictureSearch(all_files=True))


def test_what_a_run_leaves_out_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    photos = tmp_path / "photos"
    touch(photos, "a.jpg", "b.HIF", "@eaDir/a.jpg", "._a.jpg", "no_ending")
    (photos / "notes.txt").write_text("x")
    (photos / "link").symlink_to(tmp_path)
    arguments = (photos, "--csv", photos / "a.csv")
    for _ in range(2):  # its own table is nothing that it leaves out
        assert classify_tiny(*arguments) == 0
        assert (
            "2 pictures, 3 other files skipped; not searched: 1 hidden or system folder (--include-hidden), "
            "1 linked folder (--follow-links)\n"
        ) in capsys.readouterr().err
    everything = ("--include-hidden", "--follow-links", "--all-files")
    assert classify_tiny(*arguments, *everything) == 0
    assert "5 pictures, 1 other file skipped\n" in capsys.readouterr().err
    assert classify_tiny(photos / "notes.txt", "--csv", tmp_path / "b.csv") == 1
    assert "This file is not a picture" in rows_of(tmp_path / "b.csv")[0]["error"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("Trip [209]/*.jpg", ["Trip 9/1.jpg"]),
        ("Trip [2019]/*.jpg", ["Trip [2019]/1.jpg", "Trip [2019]/2.jpg", "Trip [2019]/[12].jpg"]),
        ("Trip [2019]/[12].jpg", ["Trip [2019]/[12].jpg"]),  # a name
        ("Trip [2019]/[123].jpg", ["Trip [2019]/1.jpg", "Trip [2019]/2.jpg"]),
        ("Trip [2019]/[1].jpg", ["Trip [2019]/1.jpg"]),
        ("Trip [2019]/[!1].jpg", ["Trip [2019]/2.jpg"]),
        ("Trip [[]2019]/1.jpg", ["Trip [2019]/1.jpg"]),  # as glob.escape writes it
        ("Trip [2019]", ["Trip [2019]/1.jpg", "Trip [2019]/2.jpg", "Trip [2019]/[12].jpg"]),
        ("*[2019]/?.jpg", ["Trip 9/1.jpg", "Trip [2019]/1.jpg", "Trip [2019]/2.jpg"]),
        ("**/[ab] [c]*/*.png", ["deep/x/a c/1.png", "deep/x/a [c] d/1.png"]),
        ("deep/*/", ["deep/x/a [c] d/1.png", "deep/x/a c/1.png"]),
        ("deep/../Trip ?/*", ["deep/../Trip 9/1.jpg"]),
        ("nothing [1]/*.jpg", ["nothing [1]/*.jpg"]),
    ],
)
def test_brackets_in_patterns_are_classes_or_names(
    pattern: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "Trip [2019]/1.jpg", "Trip [2019]/2.jpg", "Trip [2019]/[12].jpg", "Trip 9/1.jpg")
    touch(tmp_path, "deep/x/a c/1.png", "deep/x/a [c] d/1.png")
    (tmp_path / "Trip 9" / "notes.txt").touch()
    assert sorted(map(str, classify.expand_path(pattern))) == sorted(found)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_lists_are_read_in_the_encodings_that_shells_write(encoding: str, end: str) -> None:
    names = ["/photos/a.jpg", "caf\u00e9/猫.png", "C:\\photos\\b.jpg", "[x].png"]
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert classify.read_list((mark + end.join(names)).encode(encoding)) == names
    assert classify.read_list((mark + end.join([*names, "", ""])).encode(encoding)) == names
    assert classify.read_list((mark + "\0".join(names) + "\0" + end).encode(encoding)) == names


def test_joined_lists_and_names_in_old_encodings_are_read() -> None:
    assert classify.read_list(b"\xef\xbb\xbfa.png\n\xef\xbb\xbfb.png\ncaf\xe9.png") == [
        *("a.png", "b.png", "caf\udce9.png"),
    ]
    assert classify.read_list(b"a\0two\nlines.png\0") == ["a", "two\nlines.png"]
    assert classify.read_list(b"") == classify.read_list("\ufeff\r\n".encode("utf-16-le")) == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text", ["/home/me/a.jpg", "/a.jpg\n/b.jpg\n", "a.jpg\r\nb.jpg\r\n", "猫\n犬\r\n猫\n", "猫.png"]
)
def test_lists_that_make_no_sense_are_refused(
    encoding: str,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """UTF-16 without a byte-order mark has a NUL behind each letter, so its / was taken for a path."""
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(text.encode(encoding))))
    assert run(monkeypatch, classify.main, None, "-", "--csv", tmp_path / "a.csv") == 2
    assert "UTF-16 without a byte-order mark" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("listed", ["/", "//", "/.", "a.jpg\n/\n", "/\0", "root", "/*", "/**/*.jpg", "file:///"])
def test_a_list_never_searches_the_root_directory(listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("root").symlink_to("/")
    with pytest.raises(classify.BadList, match="is a whole disk"):
        classify.read_list(listed.encode())
    monkeypatch.chdir("/")
    for here in (b".", b"*", b"**/*.jpg"):
        with pytest.raises(classify.BadList, match="is a whole disk"):
            classify.read_list(here)


def test_a_list_that_is_cut_off_or_a_picture_is_refused() -> None:
    for data in ("a.jpg\n".encode("utf-16")[:-1], encode(noise(200, 200)), encode(noise(200, 200), "JPEG")):
        with pytest.raises(classify.BadList):
            classify.read_list(data)


@pytest.mark.parametrize("name", ["x" * 251 + ".jpg", "猫" * 83 + "xx.jpg", "x" * 247 + ".jpg", "x" * 245 + ".JPEG"])
def test_names_of_any_length_get_heatmaps_and_copies(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classify_tiny: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    for n, folder in enumerate(("a", "b", "sorted")):
        Path(folder).mkdir()
        Path(folder, name).write_bytes(encode(noise(50, 50, n)))
    Path("a", name[1:]).write_bytes(encode(noise(50, 50)))
    Path("sorted").rename("mine")
    for _ in range(2):
        for folder in ("a", "b", "mine"):
            arguments = (folder, "--csv", f"{folder}.csv", "--copy-to", "sorted", "--overlays", "heat")
            assert classify_tiny(*arguments) == 0
        assert len(list(Path("sorted").rglob("*.*"))) == 4
        heatmaps = list(Path("heat").rglob("*.png"))
        assert len(heatmaps) == 4
    files = NewFiles()
    files.save(overlay_path(Path("heat"), Path("a", name)), b"another")  # as of a picture that was replaced
    (other,) = set(Path("heat").rglob("*.png")) - set(heatmaps)
    assert other.read_bytes() == b"another"
    assert OVERLAY.search(str(other))  # so it is not taken for a picture later


@pytest.mark.parametrize("place", ["-", "/dev/stdout", "/dev/fd/1"])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_tables_go_to_standard_output(
    *,
    kind: str,
    place: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    classify_tiny: Command,
) -> None:
    monkeypatch.chdir(folder)
    assert classify_tiny("meme/one", f"--{kind}", place) == 0
    said = capsys.readouterr()
    rows = list(csv.DictReader(StringIO(said.out))) if kind == "csv" else [*map(json.loads, said.out.splitlines())]
    assert [row["path"] for row in rows] == [f"meme/one/{n}.png" for n in range(4)]
    assert "4 pictures classified" in said.err
    assert not Path("-").exists()


def test_a_table_on_standard_output_is_whole_beside_a_resumed_one(
    folder: Path, tmp_path: Path, capfd: Any, classify_tiny: Command
) -> None:
    arguments = (folder, "--csv", tmp_path / "a.csv", "--json", "-")
    for _ in range(2):
        assert classify_tiny(*arguments) == 0
        assert len(capfd.readouterr().out.splitlines()) == 16
        assert len(rows_of(tmp_path / "a.csv")) == 16


def test_a_named_pipe_takes_a_table(folder: Path, tmp_path: Path, classify_tiny: Command) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit(pipe.read_text)
        assert classify_tiny(folder, "--csv", pipe) == 0
        assert len(list(csv.DictReader(StringIO(text.result())))) == 16
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--parquet", "-"], "a Parquet table cannot go to standard output"),
        (["--parquet", "/dev/stdout"], "a Parquet table cannot go to standard output"),
        (["--csv", "-", "--json", "/dev/stdout"], "two tables cannot be one file"),
        (["--csv", "-", "--engine", "ray"], "the table is a folder"),
    ],
)
def test_what_cannot_go_to_standard_output_is_refused(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, classify.main, None, "x.png", *arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", READERS)
def test_a_second_run_into_the_same_table_is_refused(
    *, kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], classify_tiny: Command
) -> None:
    table, link = tmp_path / "table", tmp_path / "link"
    link.symlink_to(table)
    with lock_tables([table]):
        for name in (table, link):
            assert classify_tiny(folder, f"--{kind}", name) == 2
            assert f"Another run is writing to {name}" in capsys.readouterr().err
        assert not table.exists()
    assert classify_tiny(folder, f"--{kind}", link) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "link", "table"]
