import csv
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from commands import run
from pictures import ROOT, encode, noise

import classify
from images import open_picture
from model import Classifier


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
    assert list(rows[0]) == ["path", "label", "meme_probability", "verdict", "error"]
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
    assert capsys.readouterr().out.splitlines()[0] == "path,label,meme_probability,verdict,error"


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
    with pytest.raises(SystemExit) as stop:
        run(
            monkeypatch,
            classify.main,
            tiny_classifier,
            folder,
            "--csv",
            folder / "meme" / ".." / "meme" / "one" / "0.png",
        )
    assert stop.value.code == 2
    assert "is one of the pictures" in capsys.readouterr().err
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required"),
        ([".", "--csv", "nowhere/out.csv"], "cannot be written"),
        ([".", "--checkpoint", "missing.pth"], "make one with train.py"),
    ],
)
def test_wrong_usage_exits_with_2_before_any_work(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "classify.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
