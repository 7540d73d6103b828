"""ClassifierActor as rows of a table: CSV, JSON Lines or Parquet, written as they come and gone on with later."""

import csv
import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any, Protocol, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from images import BadImage
from model import Prediction

# Linux file names may be any bytes: what is no UTF-8 goes out as it came in.
TEXT_MODE: Any = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # CWE-1236; quotes alone don't stop a spreadsheet
ROW_GROUP = 10_000  # rows that a Parquet table keeps in memory at most


class BadTable(ValueError):
    """A table that cannot be gone on with; its text says in one sentence why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One picture's answer, or what is wrong with its file.

    Attributes:
        path: of the picture, as it was found.
        label: as in `Prediction`; None for a file that could not be read, and so for the next two.
        meme_probability: likewise.
        verdict: likewise.
        error: why the file cannot be read or its copy not be saved, in a sentence, or None.
        checkpoint: the first digits of the SHA-256 of the checkpoint that answered.
    """

    path: str
    label: str | None
    meme_probability: float | None
    verdict: str | None
    error: str | None
    checkpoint: str


COLUMNS = tuple(field.name for field in fields(Row))


def row_of(path: str, answer: Prediction | BadImage, sha256: str) -> Row:
    """The row for an answer."""
    checkpoint = sha256[:12]
    if isinstance(answer, BadImage):
        return Row(path, None, None, None, str(answer), checkpoint)
    return Row(path, answer.label, round(answer.meme_probability, 4), answer.verdict, None, checkpoint)


class Table(Protocol):
    """A file of rows that is being written."""

    def write(self, row: Row) -> None:
        """Add a row."""

    def close(self) -> None:
        """Finish the file."""


class JsonTable:
    """JSON Lines: one object in each line; valid after each row."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, row: Row) -> None:
        """Add a row."""
        self.file.write(json.dumps(asdict(row)) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Finish the file."""
        self.file.close()


class CsvTable:
    """Comma-separated values under a line of headings; valid after each row."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.writer = csv.writer(file)
        self.writer.writerow(COLUMNS)
        self.file.flush()

    def write(self, row: Row) -> None:
        """Add a row."""
        self.writer.writerow(csv_cells(row))
        self.file.flush()

    def close(self) -> None:
        """Finish the file."""
        self.file.close()


SCHEMA = pa.schema([(name, pa.float64() if name == "meme_probability" else pa.string()) for name in COLUMNS])


def arrow_table(rows: list[Row]) -> pa.Table:
    """The rows for Arrow, which knows only UTF-8: other bytes in a name are spelled out, as Python would."""
    cells = [asdict(row) | {"path": row.path.encode(errors="backslashreplace").decode()} for row in rows]
    return pa.Table.from_pylist(cells, SCHEMA)


class ParquetTable:
    """Parquet; there under its name once it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.writer = pq.ParquetWriter(self.partial, SCHEMA)
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row)
        if len(self.rows) >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self.writer.close()
        self.partial.replace(self.path)

    def _flush(self) -> None:
        rows, self.rows = self.rows, []
        if rows:
            self.writer.write_table(arrow_table(rows))


def csv_cells(row: Row) -> tuple[str, ...]:
    """The row as texts; its path can't be taken for a formula by a spreadsheet, and `read_csv` gets it back."""
    path, *others = astuple(row)
    safe = "'" + path if path.startswith((*FORMULA_STARTS, "'")) else path
    return safe, *("" if cell is None else str(cell) for cell in others)


def csv_arrow_table(rows: list[Row]) -> pa.Table:
    """The rows as `csv_cells` makes them, for Arrow."""
    cells = [[cell.encode(errors="backslashreplace").decode() for cell in csv_cells(row)] for row in rows]
    return pa.table([pa.array(column, pa.string()) for column in zip(*cells, strict=True)], COLUMNS)


def csv_text(rows: list[Row], more: dict[str, list[str]]) -> str:
    """A whole table as CSV, with further columns of texts, one for each row."""
    text = StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow((*COLUMNS, *more))
    for row, *others in zip(rows, *more.values(), strict=True):
        writer.writerow((*csv_cells(row), *others))
    return text.getvalue()


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a table that `CsvTable` wrote, less a last one that was cut off."""
    text = path.read_bytes().decode(TEXT_MODE["encoding"], TEXT_MODE["errors"])
    headings, *rows = csv.reader(StringIO(text, newline=""))
    if tuple(headings) != COLUMNS:
        raise ValueError("other columns")
    whole = text.endswith("\n") and len((rows or [headings])[-1]) == len(COLUMNS)  # a name may have line ends, too
    for cells in rows if whole else rows[:-1]:
        name, label, probability, verdict, error, checkpoint = cells
        known = float(probability) if probability else None
        yield Row(name.removeprefix("'"), label or None, known, verdict or None, error or None, checkpoint)


def read_json(path: Path) -> Iterator[Row]:
    """The rows of a table that `JsonTable` wrote, less a last one that was cut off."""
    *lines, cut_off = path.read_text(encoding="utf-8").split("\n")
    if cut_off and not lines:  # nothing says that this was ever such a table
        raise ValueError("no row")
    for line in lines:
        yield Row(**json.loads(line))


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a table that `ParquetTable` wrote."""
    file = pq.ParquetFile(path)
    if file.schema_arrow.names != list(COLUMNS):
        raise ValueError("other columns")
    for batch in file.iter_batches():
        for cells in batch.to_pylist():
            name = re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda spelled: chr(int(spelled[1], 16)), cells["path"])
            yield Row(**cells | {"path": name})


def _begin_text(create: Callable[[TextIO], Table], path: Path, rows: list[Row]) -> Table:
    """Write the rows beside the old file and take its place at once; the open file goes on under that name."""
    beside = path.with_name(path.name + ".partial")
    table = create(beside.open("w", **TEXT_MODE))
    for row in rows:
        table.write(row)
    beside.replace(path)
    return table


def _is_newer(path: str, written: int) -> bool:
    """Whether a file has changed since then, in nanoseconds since 1970; one that is gone has not."""
    try:
        return os.stat(path).st_mtime_ns > written  # noqa: PTH116  (a row's path is text)
    except OSError:
        return False


def _begin_parquet(path: Path, rows: list[Row]) -> Table:
    table = ParquetTable(path)
    for row in rows:
        table.write(row)
    return table


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {"csv": read_csv, "json": read_json, "parquet": read_parquet}


def read_table(path: Path, kind: str, sha256: str) -> list[Row]:
    """The rows of a table that is to be gone on with; none of one that is new.

    Args:
        path: where it lies or is to lie.
        kind: one of `READERS`.
        sha256: of the checkpoint that will answer.

    Raises:
        BadTable: if there is something that is no such table, or one of another checkpoint.
    """
    path = path.resolve()
    try:
        # An empty one is of a run that was killed before its first row.
        rows = list(READERS[kind](path)) if path.exists() and path.stat().st_size else []
    except (ValueError, TypeError, OSError, csv.Error) as error:  # Arrow's errors are among the first and third
        raise BadTable(f"{path} is there already and is no {kind} table of this command's.") from error
    if path.exists() and not path.is_file():
        raise BadTable(f"{path} is not a file.")
    if any(row.checkpoint != sha256[:12] for row in rows):
        raise BadTable(f"{path} has answers of another checkpoint; name another file for this one's.")
    return rows


def resume_table(path: Path, kind: str, rows: list[Row], asked: Collection[str]) -> tuple[Table, dict[str, Row]]:
    """Begin a table, or go on with one that was interrupted.

    Pictures asked for that could not be read, or are newer than the table, are to be answered again, so their rows go.

    Args:
        path: where it lies or is to lie.
        kind: one of `READERS`.
        rows: what `read_table` gives of it.
        asked: the paths of the pictures to answer; rows of others stay.

    Returns:
        The table, and the rows that it has already of what is asked for, by their paths.

    Raises:
        OSError: if it cannot be written.
    """
    path = path.resolve()
    written = path.stat().st_mtime_ns if rows else 0
    by_path = {row.path: row for row in rows}
    good = {p: row for p, row in by_path.items() if p in asked and not (row.error or _is_newer(p, written))}
    kept = [row for p, row in by_path.items() if p in good or p not in asked]
    if kind == "parquet":
        return _begin_parquet(path, kept), good
    return _begin_text(CsvTable if kind == "csv" else JsonTable, path, kept), good
