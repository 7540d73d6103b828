"""Answers as rows of a table: CSV, JSON Lines or Parquet, written as they come and resumed later."""

import codecs
import csv
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from images import BadImage
from model import Prediction

# Linux file names may be any bytes: what is not UTF-8 is written as it was read.
TEXT_MODE: Any = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # CWE-1236; quotes alone don't stop a spreadsheet
BYTE_ORDER_MARK = "\ufeff"  # without it, Excel reads CSV in the country's old encoding
DELIMITERS = ",;\t"  # Excel writes ; in countries with a decimal comma, and tabs as "Unicode text"
STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
OPEN_FILE = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")  # as a shell's >(command) passes them
ROW_GROUP = 10_000  # rows that a Parquet table keeps in memory at most


class BadTable(ValueError):
    """A table that cannot be written or resumed; its text says why in one sentence."""


@dataclass(frozen=True, slots=True)
class Row:
    """One picture's answer, or why there is none.

    Attributes:
        path: of the picture, as it was found.
        label: as in `Prediction`, or None for a file that cannot be read.
        meme_probability: likewise.
        verdict: likewise.
        error: one sentence if the file cannot be read or its copy cannot be saved, or None.
        checkpoint: the first 12 digits of the SHA-256 of the checkpoint that answered.
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
    """The rows for Arrow, which takes only UTF-8: other bytes in a name are escaped as in Python's source."""
    cells = [asdict(row) | {"path": row.path.encode(errors="backslashreplace").decode()} for row in rows]
    return pa.Table.from_pylist(cells, SCHEMA)


class ParquetTable:
    """Parquet, which gets its name when it is closed."""

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
    """The row as texts. An apostrophe keeps spreadsheets from taking a path for a formula; `read_csv` removes it."""
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


def decode_text(data: bytes) -> str:
    """Text in the encoding that its byte-order mark names, else in UTF-8.

    Raises:
        UnicodeDecodeError: if it is cut off or not in that encoding.
    """
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "utf-32"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    else:
        encoding = "utf-8-sig"
    return data.decode(encoding, TEXT_MODE["errors"])


def read_csv(path: Path) -> Iterator[Row]:
    """The rows of a table that `CsvTable` wrote, or a spreadsheet saved since, less an incomplete last one."""
    text = decode_text(path.read_bytes())
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    headings, *rows = csv.reader(StringIO(text, newline=""), delimiter=delimiter)
    if tuple(headings) != COLUMNS:
        raise ValueError("other columns")
    last = (rows or [headings])[-1]
    is_complete = text.endswith("\n") and len(last) == len(COLUMNS)  # a name may contain line ends, too
    for cells in rows if is_complete else rows[:-1]:
        if not any(cells):  # a line that was emptied
            continue
        name, label, number, verdict, error, checkpoint = cells
        probability = float(number.replace(",", ".")) if number else None
        yield Row(name.removeprefix("'"), label or None, probability, verdict or None, error or None, checkpoint)


def read_json(path: Path) -> Iterator[Row]:
    """The rows of a table that `JsonTable` wrote, less an incomplete last one."""
    *lines, incomplete = decode_text(path.read_bytes()).split("\n")
    if incomplete and not lines:  # nothing says that this was ever such a table
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


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {"csv": read_csv, "json": read_json, "parquet": read_parquet}


def read_table(path: Path, kind: str, sha256: str) -> list[Row]:
    """The rows of a table to resume; none of a new one.

    Args:
        path: of the table.
        kind: one of `READERS`.
        sha256: of the checkpoint that will answer.

    Raises:
        BadTable: if the file is not such a table, or one of another checkpoint.
    """
    path = path.resolve()
    try:
        # A run that was killed before its first row leaves an empty file.
        rows = list(READERS[kind](path)) if path.exists() and path.stat().st_size else []
    except (ValueError, TypeError, OSError, csv.Error) as error:  # Arrow's errors are among the first and third
        raise BadTable(f"{path} is there already and is no {kind} table of this command.") from error
    if path.exists() and not path.is_file():
        raise BadTable(f"{path} is not a file.")
    if any(row.checkpoint != sha256[:12] for row in rows):
        raise BadTable(f"{path} has answers of another checkpoint; name another file for this one's.")
    return rows


def resume_table(path: Path, kind: str, rows: list[Row], asked: Collection[str]) -> tuple[Table, dict[str, Row]]:
    """Begin a table, or resume one.

    Rows of pictures that are to be classified again go: those that failed, and those whose file is newer than the
    table.

    Args:
        path: of the table.
        kind: one of `READERS`.
        rows: what `read_table` gives for it.
        asked: the paths of the pictures to classify; rows of others stay.

    Returns:
        The table, and its rows of pictures that need not be classified again, by their paths.

    Raises:
        OSError: if it cannot be written.
    """
    path = path.resolve()
    written = path.stat().st_mtime_ns if rows else 0
    by_path = {row.path: row for row in rows}
    good = {p: row for p, row in by_path.items() if p in asked and not (row.error or _changed_since(p, written))}
    kept = [row for p, row in by_path.items() if p in good or p not in asked]
    if kind == "parquet":
        return _begin_parquet(path, kept), good
    return _begin_text(path, kind, kept), good


def _changed_since(path: str, time: int) -> bool:
    """Whether a file was written or replaced after a time in nanoseconds since 1970; one that is gone was not.

    A file that takes another's place may be older than it. On Unix, though, its change time (POSIX `st_ctime`) is that
    of the replacement, and a link's is that of its own making. Changed owners or rights also count, which only costs
    time.
    """
    try:
        file, link = os.stat(path), os.lstat(path)  # noqa: PTH116  (a row's path is text)
    except OSError:
        return False
    return max(file.st_mtime_ns, file.st_ctime_ns, link.st_ctime_ns) > time


def _begin_text(path: Path, kind: str, rows: list[Row]) -> Table:
    """Write the rows to a file beside the old one, then replace that; the open file stays the table."""
    beside = path.with_name(path.name + ".partial")
    file = beside.open("w", **TEXT_MODE)
    if kind == "csv":
        file.write(BYTE_ORDER_MARK)
    table = CsvTable(file) if kind == "csv" else JsonTable(file)
    for row in rows:
        table.write(row)
    beside.replace(path)
    return table


def _begin_parquet(path: Path, rows: list[Row]) -> Table:
    table = ParquetTable(path)
    for row in rows:
        table.write(row)
    return table


def is_stream(path: str | Path) -> bool:
    """Whether a table there cannot be read back: standard output, another open file, a pipe or a terminal."""
    if str(path) in STANDARD_OUTPUT or OPEN_FILE.fullmatch(str(path)):
        return True
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def open_stream(path: Path, kind: str) -> Table:
    """A table in CSV or JSON that is only written. Standard output stays open, and has no byte-order mark."""
    if str(path) in STANDARD_OUTPUT:
        file = sys.stdout
        if isinstance(file, TextIOWrapper):
            file.reconfigure(**TEXT_MODE)
    elif number := OPEN_FILE.fullmatch(str(path)):
        file = os.fdopen(os.dup(int(number[1])), "w", **TEXT_MODE)
    else:
        file = path.open("w", **TEXT_MODE)
    return CsvTable(file) if kind == "csv" else JsonTable(file)


OpenTables: TypeAlias = list[tuple[Table, dict[str, Row]]]  # each with the rows that it has already


def open_tables(
    files: dict[str, Path], sha256: str, asked: Collection[str], stack: ExitStack, again: Collection[str] = ()
) -> OpenTables:
    """Begin or resume the tables of a run.

    Args:
        files: by kind, at most one of each; none for CSV on standard output.
        sha256: of the checkpoint that will answer.
        asked: the paths of the pictures to classify.
        stack: closes the tables.
        again: those of them to classify again, whatever the tables have.

    Returns:
        Each table, with its rows of pictures that need not be classified again, by their paths.

    Raises:
        BadTable: if one cannot be resumed. No file has been changed then.
        OSError: if one cannot be written.
    """
    if not files:
        files = {"csv": Path(STANDARD_OUTPUT[0])}
    rows = {kind: read_table(file, kind, sha256) for kind, file in files.items() if not is_stream(file)}
    rows = {kind: [row for row in old if row.path not in again] for kind, old in rows.items()}
    tables: OpenTables = []
    for kind, file in files.items():
        table, done = resume_table(file, kind, rows[kind], asked) if kind in rows else (open_stream(file, kind), {})
        tables.append((table, done))
        if str(file) not in STANDARD_OUTPUT:
            stack.callback(table.close)
    return tables


def lock_path(path: Path) -> Path:
    """The file that a run locks while it uses a table."""
    return Path(f"{path.resolve()}.lock")


@contextmanager
def lock_tables(files: Iterable[Path]) -> Iterator[None]:
    """Keep other runs away from tables. The operating system drops the locks of a run that is killed.

    Raises:
        BadTable: if another run uses one of them.
    """
    with ExitStack() as stack:
        for path in files:
            if not is_stream(path):
                lock = FileLock(lock_path(path))
                try:
                    lock.acquire(blocking=False)
                except Timeout as error:
                    raise BadTable(f"Another run is writing to {path}. Wait for it, or name another file.") from error
                stack.callback(_release, lock)
        yield


def _release(lock: FileLock) -> None:
    with suppress(OSError):  # Windows deletes no open file
        Path(lock.lock_file).unlink()
    lock.release()
