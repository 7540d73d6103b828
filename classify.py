"""Classify pictures from the command line: python classify.py PATH... --csv FILE

A PATH is a picture, a folder with its sub-folders, a pattern such as '**/*.jpg', or - for a list on standard input.
Pictures are never moved, changed or overwritten. Run the same command again to resume.
"""

import argparse
import glob
import hashlib
import os
import re
import shutil
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from engine import (
    AUTO,
    BATCH,
    DEVICES,
    PRECISIONS,
    BadEngine,
    answer_in_parts,
    batch_size,
    describe_engine,
    device_of,
    load_fastest,
    load_with_torch,
    usable_cores,
)
from gradcam import Explanation, explain_inputs, overlay_png, pad_to_picture
from images import SUFFIXES, BadImage, PictureSearch, has_signature, has_suffix, open_picture, to_square
from model import DEFAULT_CHECKPOINT, MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier, Prediction
from photo_library import DEFAULT_TAG, STYLES, parse_tag
from tables import (
    BYTE_ORDER_MARK,
    READERS,
    STANDARD_OUTPUT,
    BadTable,
    Row,
    Table,
    decode_text,
    is_stream,
    lock_path,
    lock_tables,
    open_tables,
    read_table,
    row_of,
)

if TYPE_CHECKING:  # its packages are not in requirements.txt
    from photo_library.sidecars import Sidecars

VERDICTS = (MEME, NOT_MEME, NOT_SURE)
OVERLAY = re.compile(rf"\.({'|'.join(SUFFIXES)})(_\d+)?\.png$", re.IGNORECASE)  # how `overlay_path` names one
MAX_NAME = 255  # bytes of a file's name, on most file systems
OVERLAY_NUMBER = "_99999"  # room for what `numbered` adds to a name
EXAMPLES = """examples:
  python classify.py photos/ --csv answers.csv
  python classify.py photos/ '**/*.jpg' --copy-to sorted/ --overlays heatmaps/
  find photos/ -name '*.png' -print0 | python classify.py - --json -

Run the same command again to resume. See docs/command-line.md."""

Square = NDArray[np.uint8]
Answer = TypeVar("Answer")
Item = TypeVar("Item")
Result = TypeVar("Result")


class MissingPackage(ValueError):
    """A package that an option needs is not installed; its text says how to get it."""


class BadList(ValueError):
    """A list on standard input that cannot be used; its text says why in one sentence."""


def classify(classifier: Classifier, paths: list[Path]) -> Iterator[tuple[Path, Prediction | BadImage]]:
    """Yield each path, in order, with its prediction or why there is none."""
    return classify_batches(classifier, paths, classifier.answer)


def classify_batches(
    classifier: Classifier, paths: list[Path], answer: Callable[[Tensor], Sequence[Answer]]
) -> Iterator[tuple[Path, Answer | BadImage]]:
    """Yield each path, in order, with what `answer` returns for its picture or why there is nothing.

    Each thread opens one batch and runs the network on it, on one core. So all cores are busy, nothing is sent
    between processes, and no core waits for another that has part of the same batch. Pillow, PyTorch and OpenVINO
    release Python's lock meanwhile. One more thread than cores, because threads also wait for the disk.
    """

    def answered(batch: Sequence[Path]) -> list[Answer | BadImage]:
        squares = [load_square(path, classifier.preprocessing.input_size) for path in batch]
        good = [square for square in squares if not isinstance(square, BadImage)]
        with one_at_a_time:
            answers = iter(answer_in_parts(answer, classifier.preprocessing.normalise(good)) if good else [])
        return [square if isinstance(square, BadImage) else next(answers) for square in squares]

    threads = usable_cores() + 1
    device = device_of(classifier.network)
    # An accelerator takes one batch at a time, while the other threads decode the next ones.
    one_at_a_time = nullcontext() if device.type == "cpu" else Lock()
    size = batch_size(device)
    batches = (paths[start : start + size] for start in range(0, len(paths), size))
    todo = iter(paths)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for answers in map_in_order(pool, answered, batches, ahead=2 * threads):
            for one in answers:
                yield next(todo), one


def load_square(path: Path, side: int) -> Square | BadImage:
    """The network's input from the picture at a path, of shape (side, side, 3), or why there is none."""
    try:
        return to_square(open_picture(path), side)
    except BadImage as error:
        return error


def map_in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Do some work on every item in a pool's threads, and yield the results in the order of the items.

    Args:
        pool: does the work.
        work: called once for each item.
        items: any number; no more are taken than are needed.
        ahead: how many results may be under way or waiting beyond the next one.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after Ctrl-C, nothing more begins
        for result in waiting:
            result.cancel()


def expand_arguments(arguments: Iterable[str]) -> Iterator[str]:
    """Yield each PATH of the command line, and in place of - those of the list on standard input."""
    for argument in arguments:
        if argument == "-":
            yield from read_list(sys.stdin.buffer.read())
        else:
            yield argument


def read_list(data: bytes) -> list[str]:
    """The paths in a list, one a line or, as `find -print0` writes it, each with a NUL behind it.

    Raises:
        BadList: if this is not a list, or would search a whole disk.
    """
    if has_signature(data):
        raise BadList("Standard input is a picture, not a list of paths.")
    try:
        text = decode_text(data).rstrip("\r\n")  # PowerShell adds a line end
    except UnicodeDecodeError as error:
        raise BadList("The list on standard input is incomplete. Write it again, best as UTF-8.") from error
    separated_by_nul = "\0" in text
    lines = text.split("\0") if separated_by_nul else text.replace("\r\n", "\n").split("\n")
    paths = [path for line in lines if (path := line.removeprefix(BYTE_ORDER_MARK))]  # joined lists have several
    if separated_by_nul and not _are_paths(paths):
        raise BadList("The list on standard input is not text, or is UTF-16 without a byte-order mark. Use UTF-8.")
    for path in paths:
        if _is_root(path):
            raise BadList(f"The list on standard input names {path}, which is a whole disk. Name folders in it.")
    return paths


def _are_paths(entries: list[str]) -> bool:
    """Whether what lies between NULs can be paths: UTF-16 has single letters and bare line ends there."""
    letters = sum(len(entry) == 1 for entry in entries)
    with_line_ends = any(entry[0] in "\r\n" or entry[-1] in "\r\n" for entry in entries)
    return not with_line_ends and (letters < 2 or 2 * letters <= len(entries))


def _is_root(path: str) -> bool:
    """Whether a folder, or the one in which a pattern begins, is the root directory or that of a drive."""
    path = re.sub(r"^(file|local):/+", "/", path)  # addresses for a cluster
    if not (os.path.isdir(path) or (glob.has_magic(path) and not os.path.lexists(path))):  # noqa: PTH112
        return False
    parts = takewhile(lambda part: not glob.has_magic(part), Path(path).parts)
    folder = Path(os.path.realpath(path if os.path.isdir(path) else Path(*parts)))  # noqa: PTH112
    return folder == folder.parent


def find(path: str, search: PictureSearch | None = None) -> list[Path]:
    """The files that one PATH names; what names none is given back, so that opening it says why.

    Args:
        path: a file, which is never left out, a folder or a pattern.
        search: what to leave out of folders, and where to note it.
    """
    search = search or PictureSearch()
    if os.path.isdir(path):  # noqa: PTH112  (Path.is_dir can raise)
        return search.in_folder(Path(path))
    if glob.has_magic(path) and not os.path.lexists(path):
        return search.matching(path) or [Path(path)]
    return [Path(path)]


def say_what_was_found(search: PictureSearch, pictures: int, tables: Iterable[Path]) -> None:
    """Say how many pictures there are and what was left out, if anything was; a run's own tables do not count."""
    own = {os.path.realpath(path) for table in tables for path in (table, lock_path(table))}
    names = {os.path.basename(path) for path in own}  # noqa: PTH119
    others = sum(
        os.path.basename(path) not in names or os.path.realpath(path) not in own  # noqa: PTH119
        for path in search.skipped_files
    )
    found = _count(pictures, "picture") + (f", {_count(others, 'other file')} skipped" if others else "")
    hidden, linked = len(search.hidden_folders), len(search.linked_folders)
    unsearched = [f"{_count(hidden, 'hidden or system folder')} (--include-hidden)"] if hidden else []
    unsearched += [f"{_count(linked, 'linked folder')} (--follow-links)"] if linked else []
    if others or unsearched:
        print("; not searched: ".join(filter(None, (found, ", ".join(unsearched)))), file=sys.stderr)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class NewFiles:
    """Saves files that never take another one's place. Threads may share it.

    If a name is taken, the file gets a number; if it is taken by the same content, there is nothing to do. What is
    known of each name is kept, so that a thousand files of one name are not compared with each other.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.numbers: dict[Path, int] = {}  # the last one in use for a name
        self.saved = set[bytes]()  # digests of a name and a content

    def save(self, path: Path, content: bytes, like: Path | None = None) -> None:
        """Write a file completely or not at all.

        Args:
            path: its name, to which a number may be added.
            content: what to write.
            like: a file whose times and rights to copy.

        Raises:
            OSError: if it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _digest(path, hashlib.sha256(content).digest())
        while True:
            with self.lock:
                if digest in self.saved:
                    return
                number = self._next_number(path, digest)
                if number is None:
                    return
                self.saved.add(digest)
            try:
                _create(numbered(path, number), content, like)
                return
            except OSError as error:
                with self.lock:
                    self.saved.discard(digest)
                    self.numbers[path] = min(self.numbers[path], number - 1)
                if not isinstance(error, FileExistsError):  # unless another program was quicker
                    raise

    def _next_number(self, path: Path, digest: bytes) -> int | None:
        """Reserve the next free number of a name; None if a file with this digest comes before it."""
        number = self.numbers.get(path, 0) + 1
        while os.path.lexists(taken := numbered(path, number)):
            if taken.is_file():
                with taken.open("rb") as file:
                    self.saved.add(_digest(path, hashlib.file_digest(file, "sha256").digest()))
            self.numbers[path] = number
            if digest in self.saved:
                return None
            number += 1
        self.numbers[path] = number
        return number


def _digest(path: Path, content_sha256: bytes) -> bytes:
    return hashlib.sha256(os.fsencode(path) + content_sha256).digest()[:16]  # shorter, as there may be millions


def numbered(path: Path, number: int) -> Path:
    """The name of one of several files of a name: photo.jpg, photo_2.jpg; photo.jpg.png, photo.jpg_2.png."""
    if number == 1:
        return path
    stem, inner = os.path.splitext(path.stem) if has_suffix(path.stem) else (path.stem, "")  # noqa: PTH122
    return path.with_name(_shorten(stem, f"{inner}_{number}{path.suffix}"))


def _shorten(stem: str, ending: str) -> str:
    """The longest name that a file system takes of a stem with this ending."""
    while stem and len(os.fsencode(stem + ending)) > MAX_NAME:
        stem = stem[:-1]
    return stem + ending


def _create(path: Path, content: bytes, like: Path | None) -> None:
    """Write a file completely or not at all; FileExistsError if its name is taken."""
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
        except OSError:  # FAT and some network file systems have no hard links
            path.open("xb").close()
            try:
                beside.replace(path)  # takes the place of that empty file, which is ours
            except OSError:
                path.unlink()
                raise
    finally:
        beside.unlink(missing_ok=True)


def copy_to(folder: Path, path: Path, verdict: str, files: NewFiles) -> None:
    """Copy a picture into the verdict's folder."""
    files.save(folder / verdict / path.name, path.read_bytes(), like=path)


def overlay_path(folder: Path, path: Path) -> Path:
    """Where a picture's heatmap is saved: in folders like the picture's own.

    A name that gets too long is cut, and has a digest of the whole name instead.
    """
    inside = [part for part in path.parts if part not in (path.anchor, "..")]
    name = path.name + ".png"
    if len(os.fsencode(name)) > MAX_NAME:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
        ending = f"~{digest}{path.suffix}.png"
        name = _shorten(path.stem, OVERLAY_NUMBER + ending).replace(OVERLAY_NUMBER + ending, ending)
    return Path(folder, *inside[:-1], name)


def save_overlay(classifier: Classifier, folder: Path, path: Path, explanation: Explanation, files: NewFiles) -> None:
    """Save the picture with the heatmap of its own answer."""
    picture = open_picture(path)
    files.save(overlay_path(folder, path), overlay_png(classifier, picture, pad_to_picture(explanation, picture)))


def save_failure(error: OSError) -> str:
    """The sentence for a copy or heatmap that is missing."""
    return f"Its copy or heatmap cannot be saved: {error.strerror or error}."


@dataclass(frozen=True)
class Work:
    """What a run does with each picture.

    Attributes:
        classifier: answers.
        copies: the folder for copies, if any.
        overlays: the folder for heatmaps, if any.
        sidecars: writes sidecars, if any.
        is_watch: whether files may vanish before they are opened; they get no row then.
        files: saves copies and heatmaps.
    """

    classifier: Classifier
    copies: Path | None
    overlays: Path | None
    sidecars: "Sidecars | None"
    is_watch: bool
    files: NewFiles = field(default_factory=NewFiles)


def classify_and_save(work: Work, paths: list[Path]) -> Iterator[tuple[Path, Prediction | BadImage, str | None]]:
    """Like `classify`, but also copy the pictures, save their heatmaps and write their sidecars, if asked to.

    Each answer comes when its files are complete, with one sentence if they cannot be saved.
    """
    if not work.copies and not work.overlays and not work.sidecars:
        yield from ((path, answer, None) for path, answer in classify(work.classifier, paths))
        return

    def save(
        answered: tuple[Path, Prediction | Explanation | BadImage],
    ) -> tuple[Path, Prediction | BadImage, str | None]:
        path, answer = answered
        if isinstance(answer, BadImage):
            return path, answer, None
        prediction = answer.prediction if isinstance(answer, Explanation) else answer
        try:
            if work.copies:
                copy_to(work.copies, path, prediction.verdict, work.files)
            if work.overlays and isinstance(answer, Explanation):
                save_overlay(work.classifier, work.overlays, path, answer, work.files)
        except BadImage as error:  # the file changed meanwhile
            return path, error, None
        except OSError as error:
            return path, prediction, save_failure(error)
        return path, prediction, tag(work, path, prediction.verdict, prediction.meme_probability)

    def answer(inputs: Tensor) -> Sequence[Prediction | Explanation]:
        return explain_inputs(work.classifier, inputs) if work.overlays else work.classifier.answer(inputs)

    with ThreadPoolExecutor(usable_cores()) as pool:
        yield from map_in_order(pool, save, classify_batches(work.classifier, paths, answer), ahead=2 * BATCH)


def tag(work: Work, path: Path, verdict: str, meme_probability: float) -> str | None:
    """Write a picture's sidecar if there are to be any; return one sentence if it cannot be written."""
    if not work.sidecars:
        return None
    return work.sidecars.try_write(path, verdict, meme_probability, work.classifier.sha256)


def copy_answered(copies: Path, paths: list[Path], done: dict[str, Row], files: NewFiles) -> int:
    """Copy the pictures that earlier runs classified but did not copy; return how many cannot be copied."""
    failed = 0
    for path in tqdm([path for path in paths if str(path) in done], desc="Copying", unit="picture", leave=False):
        try:
            copy_to(copies, path, done[str(path)].verdict or NOT_SURE, files)
        except OSError as error:
            failed += 1
            tqdm.write(f"{path}: {save_failure(error)}", file=sys.stderr)
    return failed


def tag_answered(work: Work, paths: list[Path], done: dict[str, Row]) -> int:
    """Write the sidecars that earlier runs did not write; return how many cannot be written."""
    failed = 0
    for path in tqdm([path for path in paths if str(path) in done], desc="Sidecars", unit="picture", leave=False):
        row = done[str(path)]
        failure = tag(work, path, row.verdict or NOT_SURE, row.meme_probability or 0.0)
        if failure:
            failed += 1
            tqdm.write(f"{path}: {failure}", file=sys.stderr)
    return failed


def parse_arguments() -> argparse.Namespace:
    """Read the command line. `tables` has the path of each table, or its address for a cluster, by its kind."""
    parser = argparse.ArgumentParser(
        description="Say which pictures are memes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a picture, a folder with its sub-folders, a quoted pattern, or - for a list on standard input",
    )
    search = parser.add_argument_group("what to search in folders")
    search.add_argument("--include-hidden", action="store_true", help="hidden and system folders, and hidden files")
    search.add_argument("--follow-links", action="store_true", help="folders behind symbolic links")
    search.add_argument(
        "--all-files", action="store_true", help="files whose names do not end like a picture's, if they are pictures"
    )
    outputs = parser.add_argument_group("what to write")
    for kind, title in {"csv": "CSV", "json": "JSON Lines", "parquet": "Parquet"}.items():
        place = "" if kind == "parquet" else "; - is standard output"
        outputs.add_argument(f"--{kind}", metavar="FILE", help=f"a table in {title}{place}")
    outputs.add_argument("--copy-to", type=Path, metavar="DIR", help="copies, in meme/, not_meme/ and not_sure/")
    outputs.add_argument("--overlays", type=Path, metavar="DIR", help="pictures with their heatmaps")
    library = parser.add_argument_group("for photo libraries (docs/photo-libraries.md, docs/watch.md)")
    library.add_argument("--xmp", action="store_true", help="tags in an XMP sidecar beside each picture")
    library.add_argument("--xmp-style", choices=STYLES, help="name it cat.jpg.xmp (the default) or cat.xmp")
    library.add_argument("--xmp-tag", metavar="TAG", help=f"write TAG|Meme; the default TAG is {DEFAULT_TAG}")
    library.add_argument("--xmp-only", choices=VERDICTS, help="write tags for this verdict alone")
    library.add_argument("--xmp-remove", action="store_true", help="remove the tags that --xmp wrote")
    library.add_argument("--watch", action="store_true", help="go on with pictures that come into the folders later")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT, help="another network")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster (docs/cluster.md)"
    )
    parser.add_argument("--device", choices=DEVICES, default=AUTO, help="auto: an accelerator if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="auto: the fastest on this computer")
    arguments = parser.parse_args()
    arguments.tables = {kind: getattr(arguments, kind) for kind in READERS if getattr(arguments, kind)}
    places = {"-" if f in STANDARD_OUTPUT else os.path.realpath(f) for f in arguments.tables.values()}
    if len(places) < len(arguments.tables):
        parser.error("two tables cannot be one file")
    if "parquet" in arguments.tables and is_stream(arguments.tables["parquet"]):
        parser.error("a Parquet table cannot go to standard output or a pipe; name a file")
    check_library_arguments(parser, arguments)
    if arguments.engine == "ray":
        if len(arguments.tables) != 1 or arguments.copy_to or arguments.overlays:
            parser.error(f"with --engine ray there must be one of --{', --'.join(READERS)}, and no copies or overlays")
        if any(map(is_stream, arguments.tables.values())):
            parser.error("with --engine ray the table is a folder; it cannot go to standard output or a pipe")
    return arguments


def check_library_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options for photo libraries that do not go together, and fill in the defaults."""
    options = {"--xmp": arguments.xmp, "--xmp-remove": arguments.xmp_remove, "--watch": arguments.watch}
    asked = [option for option, is_asked in options.items() if is_asked]
    if asked and arguments.engine == "ray":
        parser.error(f"{asked[0]} works on the machine that has the pictures; leave out --engine ray")
    writes = arguments.tables or arguments.copy_to or arguments.overlays
    if arguments.xmp_remove and (len(asked) > 1 or writes):
        parser.error("--xmp-remove removes tags and does nothing else; run the other options in a command of their own")
    for option in ("style", "tag", "only"):
        if getattr(arguments, f"xmp_{option}") is not None and not arguments.xmp:
            parser.error(f"--xmp-{option} says how to write sidecars; add --xmp")
    arguments.xmp_style = arguments.xmp_style or STYLES[0]
    try:
        arguments.xmp_tag = parse_tag(DEFAULT_TAG if arguments.xmp_tag is None else arguments.xmp_tag)
    except ValueError as error:
        parser.error(f"--xmp-tag: {error}")
    if arguments.watch:
        if "parquet" in arguments.tables:
            parser.error("a Parquet table cannot be read before its end; with --watch, use --csv or --json")
        if len(set(map(is_stream, arguments.tables.values()))) > 1:
            parser.error("with --watch, all tables are files, or there is one on standard output")
        for path in arguments.paths:
            if not os.path.isdir(path):  # noqa: PTH112  (Path.is_dir can raise)
                parser.error(f"--watch needs folders; {path} is none")


def main() -> int:
    """Read the command line and classify.

    Returns:
        The exit code: 0 if all pictures were classified, 1 if some files failed, 2 for wrong usage or a table,
        checkpoint or list that cannot be used, 130 after Ctrl-C.
    """
    arguments = parse_arguments()
    try:
        if arguments.engine == "ray":
            return run_on_cluster(arguments)
        with ExitStack() as stack:
            return remove_xmp_tags(arguments) if arguments.xmp_remove else run(arguments, stack)
    except (BadCheckpoint, BadEngine, BadList, BadTable, MissingPackage) as error:
        return refuse(str(error))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return refuse(f"{error.filename or 'the table'} cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        can_resume = arguments.engine == "local" and not all(map(is_stream, arguments.tables.values()))
        print("Stopped. Run the same command again to resume." if can_resume else "Stopped.", file=sys.stderr)
        return 130


def search_from(arguments: argparse.Namespace) -> PictureSearch:
    """The search that the command line describes."""
    return PictureSearch(arguments.include_hidden, arguments.follow_links, arguments.all_files)


def pictures_for(arguments: argparse.Namespace, tables: Iterable[Path], *, quiet: bool = False) -> list[Path]:
    """The pictures that the command line names, less those that an earlier run saved as copies and heatmaps."""
    copies = [os.path.realpath(arguments.copy_to / verdict) + os.sep for verdict in VERDICTS if arguments.copy_to]
    overlays = [os.path.realpath(arguments.overlays) + os.sep] if arguments.overlays else []
    tables_at = {os.path.realpath(table): table for table in tables}
    search = search_from(arguments)
    paths, saved = list[Path](), 0
    for path in dict.fromkeys(file for name in expand_arguments(arguments.paths) for file in find(name, search)):
        real = os.path.realpath(path)
        if real in tables_at:
            raise BadTable(f"{tables_at[real]} is one of the pictures.")
        if real.startswith(tuple(copies)) or (real.startswith(tuple(overlays)) and OVERLAY.search(real)):
            saved += 1
        else:
            paths.append(path)
    if quiet:
        return paths
    say_what_was_found(search, len(paths), tables)
    if saved:
        print(f"{saved} pictures in the folders for copies and heatmaps are left out", file=sys.stderr)
    return paths


def run(arguments: argparse.Namespace, stack: ExitStack) -> int:
    """Classify on this machine; `stack` closes the tables. Returns the exit code."""
    if arguments.watch:  # services are stopped with SIGTERM
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
    tables_at = {kind: Path(file) for kind, file in arguments.tables.items()}
    for folder in [arguments.copy_to, arguments.overlays, *(file.parent for file in tables_at.values())]:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)  # fails before all work, not after it
    sidecars = sidecars_for(arguments)
    stack.enter_context(lock_tables(tables_at.values()))
    paths = pictures_for(arguments, tables_at.values())
    later = pictures_later(arguments, tables_at.values(), paths) if arguments.watch else None
    if arguments.overlays:  # heatmaps need gradients
        classifier = load_with_torch(arguments.checkpoint, arguments.precision, arguments.device)
    else:
        classifier = load_fastest(arguments.checkpoint, arguments.precision, arguments.device)
    print(f"Engine: {describe_engine(classifier.network)}", file=sys.stderr)
    closing = stack.enter_context(ExitStack())
    tables = open_tables(tables_at, classifier.sha256, set(map(str, paths)), closing)
    work = Work(classifier, arguments.copy_to, arguments.overlays, sidecars, is_watch=arguments.watch)
    code = answer(work, tables, paths)
    if later is None:
        return code
    print("Watching for new pictures. Press Ctrl-C to stop.", file=sys.stderr)
    try:
        answer_later(work, tables_at, tables, closing, later=later, answered=set(map(str, paths)))
    except KeyboardInterrupt:
        print("Stopped watching.", file=sys.stderr)
    return 0


def answer(work: Work, tables: list[tuple[Table, dict[str, Row]]], paths: list[Path]) -> int:
    """Classify pictures, save what is to be saved of each, and write the rows that the tables lack.

    Args:
        work: what to do.
        tables: as `open_tables` returns them.
        paths: of the pictures.

    Returns:
        The exit code.
    """
    done = {path: row for path, row in tables[0][1].items() if all(path in rows for _, rows in tables)}
    if work.overlays:
        done = {path: row for path, row in done.items() if os.path.exists(overlay_path(work.overlays, Path(path)))}  # noqa: PTH110  (Path.exists can raise)
    todo = [path for path in paths if str(path) not in done]
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {len(paths)} pictures were answered before", file=sys.stderr)
    unsaved_before = copy_answered(work.copies, paths, done, work.files) if work.copies else 0
    if work.sidecars:
        unsaved_before += tag_answered(work, paths, done)
    classified = failed = 0
    for path, answer, unsaved in tqdm(classify_and_save(work, todo), total=len(todo), unit="picture"):
        if work.is_watch and isinstance(answer, BadImage) and not os.path.lexists(path):
            continue
        row = row_of(str(path), answer, work.classifier.sha256)
        row = replace(row, error=row.error or unsaved)
        for table, rows in tables:
            if row.path not in rows:
                table.write(row)
        if row.error:
            failed += 1
            tqdm.write(f"{path}: {row.error}", file=sys.stderr)
        else:
            classified += 1
    return summarize(classified, failed + unsaved_before)


def sidecars_for(arguments: argparse.Namespace) -> "Sidecars | None":
    """What writes the sidecars that the command line asks for, if any."""
    if not arguments.xmp:
        return None
    try:
        from photo_library.sidecars import Sidecars  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackage(f"{error.name} is missing: pip install -r requirements-library.txt") from error
    return Sidecars(arguments.xmp_tag, arguments.xmp_style, arguments.xmp_only)


def remove_xmp_tags(arguments: argparse.Namespace) -> int:
    """Remove our tags from the sidecars of the pictures. Returns the exit code."""
    try:
        from photo_library.sidecars import remove_tags  # noqa: PLC0415
        from photo_library.xmp import BadSidecar  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackage(f"{error.name} is missing: pip install -r requirements-library.txt") from error
    changed = failed = 0
    for path in tqdm(pictures_for(arguments, []), unit="picture"):
        try:
            changed += remove_tags(path)
        except BadSidecar as error:
            failed += 1
            tqdm.write(f"{path}: {error}", file=sys.stderr)
    print(f"Tags removed from {_count(changed, 'sidecar')}, {_count(failed, 'picture')} failed", file=sys.stderr)
    return 1 if failed else 0


def pictures_later(arguments: argparse.Namespace, tables: Iterable[Path], paths: list[Path]) -> Iterator[list[Path]]:
    """Pictures that come into the folders after those that were found at first, or change, in batches."""
    try:
        from photo_library.watch import signatures, watch_pictures  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackage(f"{error.name} is missing: pip install -r requirements-library.txt") from error
    folders = [Path(path) for path in arguments.paths]
    return watch_pictures(folders, lambda: pictures_for(arguments, tables, quiet=True), signatures(paths))


def answer_later(
    work: Work,
    files: dict[str, Path],
    tables: list[tuple[Table, dict[str, Row]]],
    closing: ExitStack,
    *,
    later: Iterator[list[Path]],
    answered: set[str],
) -> None:
    """Answer pictures as they come, without end.

    Args:
        work: what to do with each picture.
        files: paths of the tables by their kind.
        tables: open, with the rows of the first pass.
        closing: closes them.
        later: as `pictures_later` gives them.
        answered: paths of the pictures of the first pass.
    """
    sha256 = work.classifier.sha256
    kept = {kind: file for kind, file in files.items() if not is_stream(file)}
    in_tables = {row.path for kind, file in kept.items() for row in read_table(file, kind, sha256)}
    for paths in later:
        names = set(map(str, paths))
        if names & in_tables:  # a changed picture's row is replaced; one that is not newer than its row keeps it
            closing.close()
            tables = open_tables(files, sha256, names, closing, again=names & answered)
        answer(work, tables, paths)
        answered |= names
        in_tables |= names if kept else set()


def run_on_cluster(arguments: argparse.Namespace) -> int:
    """Classify with Ray. Returns the exit code."""
    try:
        from cluster import BadAddress, classify_on_cluster, is_address, list_pictures_at  # noqa: PLC0415
    except ImportError as error:
        return refuse(f"{error.name} is missing: pip install -r requirements-cluster.txt")
    ((kind, target),) = arguments.tables.items()
    search = search_from(arguments)
    try:
        paths = dict.fromkeys(
            path
            for name in expand_arguments(arguments.paths)
            for path in (list_pictures_at(name, search) if is_address(name) else map(str, find(name, search)))
        )
        say_what_was_found(search, len(paths), [])
        with lock_tables([] if is_address(target) else [Path(target)]):
            options = {"precision": arguments.precision, "device": arguments.device}
            return summarize(*classify_on_cluster(paths, arguments.checkpoint, target, kind, **options))
    except BadAddress as error:
        return refuse(str(error))


def refuse(sentence: str) -> int:
    """Say why nothing was done, as argparse does; return the exit code."""
    print(f"classify.py: error: {sentence}", file=sys.stderr)
    return 2


def summarize(classified: int, failed: int) -> int:
    """Say how many pictures were classified and how many failed; return the exit code."""
    print(f"{classified} pictures classified, {failed} files failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
