"""Sort pictures from the command line: python classify.py PATH... --csv FILE

A PATH is a picture, a folder, which is searched with all its sub-folders, a pattern like '**/*.jpg', or -
for a list on standard input, one path in each line or, as `find -print0` writes it, before each NUL. Nothing is
ever moved, changed or overwritten. With a table, the same command goes on where it was stopped (Parquet: only if by
Ctrl-C; not on a cluster).
"""

import argparse
import glob
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from io import TextIOWrapper
from itertools import count
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine import best_engine, load_fastest, usable_cores
from gradcam import Explanation, explain_inputs, overlay_png, pad_to_picture
from images import SUFFIXES, BadImage, find_pictures, open_picture, to_square
from model import DEFAULT_CHECKPOINT, MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier, Prediction
from tables import READERS, TEXT_MODE, BadTable, CsvTable, Row, Table, read_table, resume_table, row_of

BATCH = 16
VERDICTS = (MEME, NOT_MEME, NOT_SURE)
OVERLAY = re.compile(rf"\.({'|'.join(SUFFIXES)})(_\d+)?\.png$", re.IGNORECASE)  # how `overlay_path` names one

Square = NDArray[np.uint8]
Answer = TypeVar("Answer")
Item = TypeVar("Item")
Result = TypeVar("Result")


def classify(classifier: Classifier, paths: list[Path]) -> Iterator[tuple[Path, Prediction | BadImage]]:
    """Give each path, in order, with its prediction or with what is wrong with the file."""
    return classify_batches(classifier, paths, classifier.answer)


def classify_batches(
    classifier: Classifier, paths: list[Path], answer: Callable[[Tensor], Sequence[Answer]]
) -> Iterator[tuple[Path, Answer | BadImage]]:
    """Give each path, in order, with what `answer` says of its picture or with what is wrong with the file.

    Each thread opens one batch and asks the network for it, on one core: so every core is always busy, nothing
    is handed from process to process, and the cores need not share a batch, where they would wait for each other.
    Pillow, PyTorch and OpenVINO let other threads run meanwhile. One more thread than cores, for waits on the disk.
    """

    def answered(batch: Sequence[Path]) -> list[Answer | BadImage]:
        squares = [load_square(path, classifier.preprocessing.input_size) for path in batch]
        good = [square for square in squares if not isinstance(square, BadImage)]
        answers = iter(answer(classifier.preprocessing.normalise(good)) if good else [])
        return [square if isinstance(square, BadImage) else next(answers) for square in squares]

    threads = usable_cores() + 1
    batches = (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))
    todo = iter(paths)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for answers in map_in_order(pool, answered, batches, ahead=2 * threads):
            for one in answers:
                yield next(todo), one


def load_square(path: Path, side: int) -> Square | BadImage:
    """What the network sees of the picture at a path, or what is wrong with the file."""
    try:
        return to_square(open_picture(path), side)
    except BadImage as error:
        return error


def map_in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Do some work on every item in a pool's threads, and give the results in the order of the items.

    Args:
        pool: whose threads.
        work: what to do.
        items: any number; no more are taken than are needed.
        ahead: how many results may be under way or waiting beyond the one that is given next.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after Ctrl-C, nobody waits for what has not begun
        for result in waiting:
            result.cancel()


def expand_stdin(patterns: list[str]) -> Iterator[str]:
    """Each PATH of the command line; in place of -, those of the list on standard input."""
    for pattern in patterns:
        if pattern != "-":
            yield pattern
            continue
        listed = sys.stdin.buffer.read()
        lines = listed.split(b"\0") if b"\0" in listed else listed.replace(b"\r\n", b"\n").split(b"\n")
        yield from (os.fsdecode(line) for line in lines if line)


def find(pattern: str) -> list[Path]:
    """The files that one PATH means."""
    if os.path.isdir(pattern):  # noqa: PTH112  (Path.is_dir can raise)
        return find_pictures(Path(pattern))
    if glob.has_magic(pattern) and not os.path.lexists(pattern):
        matches = without_link_loops(glob.glob(pattern, recursive=True))  # noqa: PTH207
        files = without_link_loops([str(found) for match in matches for found in find(match)])
        return [Path(file) for file in files] or [Path(pattern)]
    return [Path(pattern)]


def without_link_loops(paths: list[str]) -> list[str]:
    """Each once, by the shortest way to its folder: `**` also follows links, round and round."""
    real = cache(os.path.realpath)  # asks the disk for every part of a path
    places: dict[tuple[str, str], str] = {}
    for path in sorted(paths, key=lambda path: (len(path), path)):
        folder, name = os.path.split(path)
        places.setdefault((real(folder), name), path)
    return sorted(places.values())


def save_new(path: Path, content: bytes, like: Path | None = None) -> None:
    """Write a file whole or not at all, and only if it is new: another file of that name stays.

    This one then gets a number; if the very same content is there already, nothing happens.

    Args:
        path: where to.
        content: what.
        like: a file whose times to take over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        numbered = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        if not os.path.lexists(numbered):
            with suppress(FileExistsError):  # another thread or program was quicker
                _create(numbered, content, like)
                return
        if numbered.is_file() and numbered.stat().st_size == len(content) and numbered.read_bytes() == content:
            return


def _create(path: Path, content: bytes, like: Path | None) -> None:
    """Write a file whole or not at all; FileExistsError if there is anything of that name."""
    beside = path.with_name(f".{uuid4()}.partial")
    try:
        beside.write_bytes(content)
        if like:
            with suppress(OSError):  # some file systems keep neither times nor rights
                shutil.copystat(like, beside)
        try:
            path.hardlink_to(beside)  # unlike a rename, it never takes another file's place
        except FileExistsError:
            raise
        except OSError:  # memory sticks and some networks know no such links
            path.open("xb").close()
            try:
                beside.replace(path)  # takes the place of that empty file, which is ours
            except OSError:
                path.unlink()
                raise
    finally:
        beside.unlink(missing_ok=True)


def copy_to(folder: Path, path: Path, verdict: str) -> None:
    """Copy a picture into the verdict's folder."""
    save_new(folder / verdict / path.name, path.read_bytes(), like=path)


def overlay_path(folder: Path, path: Path) -> Path:
    """Where a picture's heatmap is saved: in folders like the picture's own."""
    inside = [part for part in path.parts if part not in (path.anchor, "..")]
    return Path(folder, *inside[:-1], path.name + ".png")


def save_overlay(classifier: Classifier, folder: Path, path: Path, explanation: Explanation) -> None:
    """Save the picture under the heatmap of its own answer."""
    picture = open_picture(path)
    save_new(overlay_path(folder, path), overlay_png(classifier, picture, pad_to_picture(explanation, picture)))


def save_failure(error: OSError) -> str:
    """The sentence about a copy or heatmap that is missing."""
    return f"Its copy or heatmap cannot be saved: {error.strerror or error}."


def classify_and_save(
    classifier: Classifier, paths: list[Path], copies: Path | None, overlays: Path | None
) -> Iterator[tuple[Path, Prediction | BadImage, str | None]]:
    """Like `classify`; besides, copy the pictures and save their heatmaps if there are folders for them.

    Each answer comes when its files are complete, with the reason if they cannot be saved.
    """
    if not copies and not overlays:
        yield from ((path, answer, None) for path, answer in classify(classifier, paths))
        return

    def save(
        answered: tuple[Path, Prediction | Explanation | BadImage],
    ) -> tuple[Path, Prediction | BadImage, str | None]:
        path, answer = answered
        if isinstance(answer, BadImage):
            return path, answer, None
        prediction = answer.prediction if isinstance(answer, Explanation) else answer
        try:
            if copies:
                copy_to(copies, path, prediction.verdict)
            if overlays and isinstance(answer, Explanation):
                save_overlay(classifier, overlays, path, answer)
        except BadImage as error:  # the file has changed meanwhile
            return path, error, None
        except OSError as error:
            return path, prediction, save_failure(error)
        return path, prediction, None

    def answer(inputs: Tensor) -> Sequence[Prediction | Explanation]:
        return explain_inputs(classifier, inputs) if overlays else classifier.answer(inputs)

    with ThreadPoolExecutor(usable_cores()) as pool:
        yield from map_in_order(pool, save, classify_batches(classifier, paths, answer), ahead=2 * BATCH)


def copy_answered(copies: Path, paths: list[Path], done: dict[str, Row]) -> int:
    """Copy the pictures that were answered before, where that is still to be done; how many cannot be copied."""
    lost = 0
    for path in tqdm([path for path in paths if str(path) in done], desc="Copying", unit="picture", leave=False):
        try:
            copy_to(copies, path, done[str(path)].verdict or NOT_SURE)
        except OSError as error:
            lost += 1
            tqdm.write(f"{path}: {save_failure(error)}", file=sys.stderr)
    return lost


def open_tables(
    files: dict[str, Path], sha256: str, paths: list[Path], stack: ExitStack
) -> list[tuple[Table, dict[str, Row]]]:
    """The tables to write, each with the rows of these pictures that it has already; else standard output."""
    asked = set(map(str, paths))
    tables: list[tuple[Table, dict[str, Row]]] = []
    rows = {kind: read_table(file, kind, sha256) for kind, file in files.items()}  # before any is changed
    for kind, file in files.items():
        tables.append(resume_table(file, kind, rows[kind], asked))
        stack.callback(tables[-1][0].close)
    if not tables:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(**TEXT_MODE)
        tables.append((CsvTable(sys.stdout), {}))
    return tables


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Say of pictures whether they are memes.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture, a folder, a pattern, or - for a list")
    for kind in READERS:
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the table as {kind}")
    parser.add_argument("--copy-to", type=Path, metavar="DIR", help="copy into meme, not_meme and not_sure there")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="save each picture under its heatmap there")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on a cluster of machines")
    arguments = parser.parse_args()
    arguments.tables = {kind: getattr(arguments, kind) for kind in READERS if getattr(arguments, kind)}
    if len({os.path.realpath(file) for file in arguments.tables.values()}) < len(arguments.tables):
        parser.error("two tables cannot be one file")
    if arguments.engine == "ray" and (len(arguments.tables) != 1 or arguments.copy_to or arguments.overlays):
        parser.error(f"with --engine ray there must be one of --{', --'.join(READERS)}, and no copies or overlays")
    return arguments


def main() -> int:
    """Read the command line and classify.

    Returns:
        0 when all was read, 1 when some files failed, 2 for wrong usage, 130 after Ctrl-C.
    """
    arguments = parse()
    try:
        if arguments.engine == "ray":
            return run_on_cluster(arguments)
        with ExitStack() as stack:
            return run(arguments, stack)
    except (BadCheckpoint, BadTable) as error:
        return refuse(str(error))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return refuse(f"{error.filename or 'the table'} cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        goes_on = arguments.tables and arguments.engine == "local"
        print("Stopped. The same command goes on from here." if goes_on else "Stopped.", file=sys.stderr)
        return 130


def pictures_for(arguments: argparse.Namespace, tables: list[Path]) -> list[Path]:
    """The pictures that the command line means, less those where an earlier run has put copies and heatmaps."""
    copies = [os.path.realpath(arguments.copy_to / verdict) + os.sep for verdict in VERDICTS if arguments.copy_to]
    overlays = [os.path.realpath(arguments.overlays) + os.sep] if arguments.overlays else []
    tables_at = {os.path.realpath(file): file for file in tables}
    paths, earlier = list[Path](), 0
    for path in dict.fromkeys(found for pattern in expand_stdin(arguments.paths) for found in find(pattern)):
        real = os.path.realpath(path)
        if real in tables_at:
            raise BadTable(f"{tables_at[real]} is one of the pictures.")
        if real.startswith(tuple(copies)) or (real.startswith(tuple(overlays)) and OVERLAY.search(real)):
            earlier += 1
        else:
            paths.append(path)
    if earlier:
        print(f"{earlier} pictures in the folders for copies and heatmaps are left out", file=sys.stderr)
    return paths


def run(arguments: argparse.Namespace, stack: ExitStack) -> int:
    """Do what the command line says; 0 when all was read, 1 when some files failed."""
    files = {kind: Path(file) for kind, file in arguments.tables.items()}
    for folder in [arguments.copy_to, arguments.overlays, *(file.parent for file in files.values())]:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)  # before all work, if it cannot be had
    paths = pictures_for(arguments, list(files.values()))
    if arguments.overlays:  # they need the network itself
        classifier = Classifier.load(arguments.checkpoint)
    else:
        classifier = load_fastest(arguments.checkpoint)
        print(f"Engine: {best_engine()}", file=sys.stderr)
    tables = open_tables(files, classifier.sha256, paths, stack)
    done = {path: row for path, row in tables[0][1].items() if all(path in rows for _, rows in tables)}
    if arguments.overlays:
        done = {path: row for path, row in done.items() if os.path.exists(overlay_path(arguments.overlays, Path(path)))}  # noqa: PTH110  (Path.exists can raise)
    todo = [path for path in paths if str(path) not in done]
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} pictures were answered before", file=sys.stderr)
    lost = copy_answered(arguments.copy_to, paths, done) if arguments.copy_to else 0
    failed = 0
    answers = classify_and_save(classifier, todo, arguments.copy_to, arguments.overlays)
    for path, answer, unsaved in tqdm(answers, total=len(todo), unit="picture"):
        row = row_of(str(path), answer, classifier.sha256)
        row = replace(row, error=row.error or unsaved)
        for table, rows in tables:
            if row.path not in rows:
                table.write(row)
        if row.error:
            failed += 1
            tqdm.write(f"{path}: {row.error}", file=sys.stderr)
    return summary(len(todo) - failed, failed + lost)


def run_on_cluster(arguments: argparse.Namespace) -> int:
    """Do what the command line says with Ray; 0 when all was read, 1 when some files failed."""
    try:
        from cluster import BadAddress, classify_on_cluster, is_address, list_pictures_at  # noqa: PLC0415
    except ImportError as error:
        return refuse(f"{error.name} is missing: pip install -r requirements-cluster.txt")
    ((kind, target),) = arguments.tables.items()
    try:
        paths = [
            found
            for pattern in expand_stdin(arguments.paths)
            for found in (list_pictures_at(pattern) if is_address(pattern) else map(str, find(pattern)))
        ]
        return summary(*classify_on_cluster(dict.fromkeys(paths), arguments.checkpoint, target, kind))
    except BadAddress as error:
        return refuse(str(error))


def refuse(sentence: str) -> int:
    """Say why nothing was done, like argparse."""
    print(f"classify.py: error: {sentence}", file=sys.stderr)
    return 2


def summary(classified: int, failed: int) -> int:
    """Say how it went; 0 when all was read, 1 when some files failed."""
    print(f"{classified} pictures classified, {failed} files failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
