import csv
import os
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tables
from images import BadImage
from model import MEME, NOT_SURE, Prediction
from tables import (
    COLUMNS,
    READERS,
    BadTable,
    Row,
    Table,
    csv_cells,
    csv_text,
    lock_tables,
    read_table,
    resume_table,
    row_of,
)

SHA = "0123456789abcdef"
ROWS = [
    row_of("a.png", Prediction(MEME, 0.98765, NOT_SURE), SHA),
    row_of('-b,"\n.png', BadImage("This file is empty."), SHA),
    row_of("=1+2", Prediction(MEME, 1.0, MEME), SHA),
    row_of("猫.png", Prediction(MEME, 0.0, MEME), SHA),
]
NAMES = {row.path for row in ROWS}


def open_table(path: Path, kind: str, sha256: str, asked: Collection[str]) -> tuple[Table, dict[str, Row]]:
    return resume_table(path, kind, read_table(path, kind, sha256), asked)


def test_a_row_says_what_the_answer_says() -> None:
    assert ROWS[0] == Row("a.png", "meme", 0.9877, "not_sure", None, "0123456789ab")
    assert ROWS[1] == Row('-b,"\n.png', None, None, None, "This file is empty.", "0123456789ab")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_killed_run_loses_no_row(kind: str, tmp_path: Path) -> None:
    """Each row is in the file before the next one is written."""
    table, _ = open_table(tmp_path / "table", kind, SHA, NAMES)
    for number, row in enumerate(ROWS, 1):
        table.write(row)
        assert list(READERS[kind](tmp_path / "table")) == ROWS[:number]
    table.close()


@pytest.mark.parametrize("kind", READERS)
def test_rows_come_back_as_they_were_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    table, done = open_table(path, kind, SHA, NAMES)
    assert done == {}
    for row in ROWS:
        table.write(row)
    table.close()
    assert list(READERS[kind](path)) == ROWS
    table, done = open_table(path, kind, SHA, NAMES)
    good = [row for row in ROWS if not row.error]  # what could not be read is to be tried again
    assert done == {row.path: row for row in good}
    more = Row("more", None, None, None, "x", SHA[:12])
    table.write(more)
    table.close()
    assert list(READERS[kind](path)) == [*good, more]
    assert [file.name for file in tmp_path.iterdir()] == ["table"]


def test_a_long_parquet_table_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", 2)
    rows = [row_of(f"{number}.png", Prediction(MEME, 0.9, MEME), SHA) for number in range(5)]
    table, _ = open_table(tmp_path / "table", "parquet", SHA, [])
    for row in rows:
        table.write(row)
    table.close()
    assert list(READERS["parquet"](tmp_path / "table")) == rows


@pytest.mark.parametrize("kind", READERS)
def test_what_has_changed_since_is_answered_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Path(name).touch()
    names = ["a.png", "b.png", "gone.png"]
    rows = [row_of(name, Prediction(MEME, 0.9, MEME), SHA) for name in names]
    table, _ = open_table(Path("table"), kind, SHA, names)
    for row in rows:
        table.write(row)
    table.close()
    later = Path("table").stat().st_mtime_ns + 1_000_000_000
    os.utime("a.png", ns=(later, later))
    table, done = open_table(Path("table"), kind, SHA, names)
    table.close()
    assert list(done.values()) == list(READERS[kind](Path("table"))) == rows[1:]


@pytest.mark.parametrize("kind", READERS)
def test_rows_of_pictures_that_are_not_asked_for_stay(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    table, _ = open_table(path, kind, SHA, NAMES)
    for row in ROWS:
        table.write(row)
    table.close()
    table, done = open_table(path, kind, SHA, {ROWS[0].path})
    table.close()
    assert list(done.values()) == ROWS[:1]
    assert list(READERS[kind](path)) == ROWS


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("names", [b"caf\xe9.png", b"caf\xc3\xa9.png", b"'=x.png", b"'x.png"])
def test_names_that_are_no_utf_8_come_back(kind: str, names: bytes, tmp_path: Path) -> None:
    row = row_of(names.decode(errors="surrogateescape"), BadImage("x"), SHA)
    table, _ = open_table(tmp_path / "table", kind, SHA, NAMES)
    table.write(row)
    table.close()
    assert list(READERS[kind](tmp_path / "table")) == [row]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_row_that_was_cut_off_is_answered_again(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    table, _ = open_table(path, kind, SHA, NAMES)
    for row in ROWS:
        table.write(row)
    whole = path.read_bytes()  # valid without closing
    for end in range(len(whole) - 1, whole.rindex(b"\n", 0, -1), -1):
        path.write_bytes(whole[:end])
        assert list(READERS[kind](path)) == ROWS[:-1]
    table.close()


@pytest.mark.parametrize("kind", READERS)
def test_an_empty_file_is_a_table_without_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.touch()
    table, rows = open_table(path, kind, SHA, NAMES)
    table.write(ROWS[0])
    table.close()
    assert rows == {}
    assert list(READERS[kind](path)) == ROWS[:1]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_table_without_rows_can_be_resumed(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    open_table(path, kind, SHA, NAMES)  # as if killed: nothing is closed
    assert open_table(path, kind, SHA, NAMES)[1] == {}


def test_a_row_that_was_cut_off_inside_a_name_of_two_lines_is_answered_again(tmp_path: Path) -> None:
    path = tmp_path / "table"
    table, _ = open_table(path, "csv", SHA, NAMES)
    for row in (ROWS[0], replace(ROWS[0], path="one\ntwo.png")):
        table.write(row)
    whole = path.read_bytes()
    for end in range(whole.index(b'"one'), len(whole)):
        path.write_bytes(whole[:end])
        assert list(READERS["csv"](path)) == ROWS[:1]


def test_no_cell_is_a_formula() -> None:
    headings, first, second, _, third, _ = csv_text(ROWS, {"correction": ["not_meme", "", "", ""]}).splitlines()
    assert headings == "path,label,meme_probability,verdict,error,checkpoint,correction"
    assert first == "a.png,meme,0.9877,not_sure,,0123456789ab,not_meme"
    assert second.startswith("\"'-b,")
    assert third.startswith("'=1+2,")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "content", [b"my diary\n", b"my diary", b"a,b\n1,2\n", b'{"a": 1}\n', b'{"a": 1}', b"\xff\xfe\x00"]
)
def test_a_file_that_is_no_table_is_left_alone(kind: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "diary"
    path.write_bytes(content)
    with pytest.raises(BadTable, match="is there already and is no"):
        open_table(path, kind, SHA, NAMES)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_is_left_alone(kind: str, tmp_path: Path) -> None:
    with pytest.raises(BadTable):
        open_table(tmp_path, kind, SHA, NAMES)
    with pytest.raises(BadTable):
        open_table(Path("/dev/null"), kind, SHA, NAMES)


def test_a_parquet_table_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    with pytest.raises(BadTable, match="is there already and is no"):
        open_table(path, "parquet", SHA, NAMES)


@pytest.mark.parametrize("kind", READERS)
def test_answers_of_two_checkpoints_do_not_mix(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "table"
    table, _ = open_table(path, kind, SHA, NAMES)
    table.write(ROWS[0])
    table.close()
    with pytest.raises(BadTable, match="another checkpoint"):
        open_table(path, kind, "f" * 64, NAMES)
    assert list(READERS[kind](path)) == ROWS[:1]


def saved_by_excel(delimiter: str, line_end: str) -> str:
    """The table as Excel writes it: numbers as the country does, quotes only where needed."""
    text = StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end)
    writer.writerow(COLUMNS)
    for row in ROWS:
        path, label, probability, *others = csv_cells(row)
        number = f"{float(probability):g}" if probability else ""  # 1.0 becomes 1
        writer.writerow((path, label, number.replace(".", ",") if delimiter == ";" else number, *others))
    return text.getvalue()


@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_that_a_spreadsheet_saved_is_resumed(
    delimiter: str, encoding: str, line_end: str, tmp_path: Path
) -> None:
    path = tmp_path / "table"
    path.write_bytes((saved_by_excel(delimiter, line_end) + delimiter * 5 + line_end).encode(encoding))
    assert list(READERS["csv"](path)) == ROWS
    table, done = open_table(path, "csv", SHA, NAMES)
    table.write(ROWS[1])
    table.close()
    assert len(done) == 3
    assert path.read_text(encoding="utf-8").startswith("\ufeffpath,label,")
    assert list(READERS["csv"](path)) == [ROWS[0], *ROWS[2:], ROWS[1]]


@pytest.mark.parametrize("way", ["rename", "copy", "write", "link"])
def test_what_an_older_file_has_replaced_is_answered_again(way: str, tmp_path: Path) -> None:
    picture, other = tmp_path / "a.png", tmp_path / "older.png"
    other.write_bytes(b"other")
    os.utime(other, (1, 1))
    (tmp_path / "first.png").write_bytes(b"first")  # of the same size
    if way == "link":
        picture.symlink_to("first.png")
    else:
        picture.write_bytes(b"first")
    row = row_of(str(picture), Prediction(MEME, 0.9, MEME), SHA)
    table, _ = open_table(tmp_path / "table", "csv", SHA, [row.path])
    table.write(row)
    table.close()
    written = (tmp_path / "table").stat().st_mtime_ns
    (clock := tmp_path / "clock").touch()
    while clock.stat().st_ctime_ns <= written:  # some milliseconds, until the file system's clock ticks
        clock.touch()
    if way == "rename":
        other.replace(picture)
    elif way == "copy":
        picture.unlink()
        shutil.copy2(other, picture)
    elif way == "link":
        picture.unlink()
        picture.symlink_to(other.name)
    else:
        picture.write_bytes(b"other")
        os.utime(picture, (1, 1))
    assert picture.stat().st_mtime_ns < written
    table, done = open_table(tmp_path / "table", "csv", SHA, [row.path])
    table.close()
    assert done == {}


def test_tables_are_locked_for_one_run(tmp_path: Path) -> None:
    tables_at = [tmp_path / "a.csv", tmp_path / "b.json"]
    with lock_tables(tables_at), ExitStack() as other:
        for path in tables_at:
            with pytest.raises(BadTable, match="Another run is writing to"):
                other.enter_context(lock_tables([tmp_path / "free", path]))
    (tmp_path / "a.csv.lock").touch()  # of a run that was killed
    with lock_tables(tables_at):
        pass
    assert not list(tmp_path.iterdir())
