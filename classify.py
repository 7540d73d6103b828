"""Classify pictures from the command line: python classify.py PATH... --csv FILE

A PATH is a picture, a folder with its sub-folders, a pattern such as '**/*.jpg', or - for a list on standard input.
Pictures are never moved, changed or overwritten. Run the same command again to resume.
"""

import argparse
import glob
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from torch import Tensor
from tqdm import tqdm

from engine import (
    AUTO,
    BATCH,
    DEVICES,
    PRECISIONS,
    BadEngine,
    classify_batches,
    describe_engine,
    load_fastest,
    load_with_torch,
    map_in_order,
    usable_cores,
)
from gradcam import Explanation, explain_inputs
from images import BadImage, PictureSearch, has_signature
from model import DEFAULT_CHECKPOINT, MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier, Prediction
from photo_library.copies import OVERLAY, NewFiles, copy_classified, copy_to, overlay_path, save_failure, save_overlay
from photo_library.options import add_library_options, check_library_options
from tables import (
    BYTE_ORDER_MARK,
    READERS,
    STANDARD_OUTPUT,
    BadTable,
    OpenTables,
    decode_text,
    is_stream,
    lock_path,
    lock_tables,
    open_tables,
    row_of,
)

if TYPE_CHECKING:  # its packages are not in requirements.txt
    from photo_library.sidecars import Sidecars

VERDICTS = (MEME, NOT_MEME, NOT_SURE)
EXAMPLES = """examples:
  python classify.py photos/ --csv answers.csv
  python classify.py photos/ '**/*.jpg' --copy-to sorted/ --overlays heatmaps/
  find photos/ -name '*.png' -print0 | python classify.py - --json -

Run the same command again to resume. See docs/command-line.md."""


class MissingPackage(ValueError):
    """A package that an option needs is not installed; its text says how to get it."""


class BadList(ValueError):
    """A list on standard input that cannot be used; its text says why in one sentence."""


@contextmanager
def optional_packages(requirements: str) -> Iterator[None]:
    """Turn the failed import of a package that `requirements.txt` lacks into a `MissingPackage`."""
    try:
        yield
    except ImportError as error:
        raise MissingPackage(f"{error.name} is missing: pip install -r {requirements}") from error


def classify(classifier: Classifier, paths: list[Path]) -> Iterator[tuple[Path, Prediction | BadImage]]:
    """Yield each path, in order, with its prediction or the error that prevents one."""
    return classify_batches(classifier, paths, classifier.answer)


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


def expand_path(path: str, search: PictureSearch | None = None) -> list[Path]:
    """The files that one PATH names. A path that names none is returned as it is, so that opening it says why.

    Args:
        path: a file, which is always taken, a folder or a pattern.
        search: what to skip in folders, and where to record it.
    """
    search = search or PictureSearch()
    if os.path.isdir(path):  # noqa: PTH112  (Path.is_dir can raise)
        return search.in_folder(Path(path))
    if glob.has_magic(path) and not os.path.lexists(path):
        return search.matching(path) or [Path(path)]
    return [Path(path)]


def report_search(search: PictureSearch, pictures: int, tables: Iterable[Path]) -> None:
    """Print how many pictures were found and what was skipped, if anything was; a run's own tables do not count."""
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


@dataclass(frozen=True)
class Job:
    """The classifier of a run, and what to save for each picture.

    Attributes:
        classifier: classifies the pictures.
        copies: folder for copies; None for no copies.
        overlays: folder for heatmaps; None for no heatmaps.
        sidecars: writes XMP sidecars; None for no sidecars.
        is_watch: files may vanish before they are opened, and get no row then.
        files: saves copies and heatmaps.
    """

    classifier: Classifier
    copies: Path | None
    overlays: Path | None
    sidecars: "Sidecars | None"
    is_watch: bool
    files: NewFiles = field(default_factory=NewFiles)


def classify_and_save(job: Job, paths: list[Path]) -> Iterator[tuple[Path, Prediction | BadImage, str | None]]:
    """Like `classify`, but also copy the pictures, save their heatmaps and write their sidecars, if the job says so.

    Each prediction is yielded when its files are complete, with one sentence if they cannot be saved.
    """
    if not job.copies and not job.overlays and not job.sidecars:
        yield from ((path, answer, None) for path, answer in classify(job.classifier, paths))
        return

    def save(
        answered: tuple[Path, Prediction | Explanation | BadImage],
    ) -> tuple[Path, Prediction | BadImage, str | None]:
        path, answer = answered
        if isinstance(answer, BadImage):
            return path, answer, None
        prediction = answer.prediction if isinstance(answer, Explanation) else answer
        try:
            if job.copies:
                copy_to(job.copies, path, prediction.verdict, job.files)
            if job.overlays and isinstance(answer, Explanation):
                save_overlay(job.classifier, job.overlays, path, answer, job.files)
        except BadImage as error:  # the file changed meanwhile
            return path, error, None
        except OSError as error:
            return path, prediction, save_failure(error)
        if not job.sidecars:
            return path, prediction, None
        failure = job.sidecars.try_write(path, prediction.verdict, prediction.meme_probability, job.classifier.sha256)
        return path, prediction, failure

    def answer(inputs: Tensor) -> Sequence[Prediction | Explanation]:
        return explain_inputs(job.classifier, inputs) if job.overlays else job.classifier.answer(inputs)

    with ThreadPoolExecutor(usable_cores()) as pool:
        yield from map_in_order(pool, save, classify_batches(job.classifier, paths, answer), ahead=2 * BATCH)


def parse_arguments() -> argparse.Namespace:
    """Read the command line. `tables` maps the kind of each table to its path, or to its address on a cluster."""
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
    search.add_argument("--all-files", action="store_true", help="pictures whatever the ending of their names")
    outputs = parser.add_argument_group("what to write")
    for kind, title in {"csv": "CSV", "json": "JSON Lines", "parquet": "Parquet"}.items():
        place = "" if kind == "parquet" else "; - is standard output"
        outputs.add_argument(f"--{kind}", metavar="FILE", help=f"a table in {title}{place}")
    outputs.add_argument("--copy-to", type=Path, metavar="DIR", help="copies, in meme/, not_meme/ and not_sure/")
    outputs.add_argument("--overlays", type=Path, metavar="DIR", help="pictures with their heatmaps")
    add_library_options(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT, help="another network")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster (docs/cluster.md)"
    )
    parser.add_argument("--device", choices=DEVICES, default=AUTO, help="auto: an accelerator if there is one")
    parser.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="auto: what was measured as fastest here")
    arguments = parser.parse_args()
    arguments.tables = {kind: getattr(arguments, kind) for kind in READERS if getattr(arguments, kind)}
    places = {"-" if f in STANDARD_OUTPUT else os.path.realpath(f) for f in arguments.tables.values()}
    if len(places) < len(arguments.tables):
        parser.error("two tables cannot be one file")
    if "parquet" in arguments.tables and is_stream(arguments.tables["parquet"]):
        parser.error("a Parquet table cannot go to standard output or a pipe; name a file")
    check_library_options(parser, arguments)
    if arguments.engine == "ray":
        if len(arguments.tables) != 1 or arguments.copy_to or arguments.overlays:
            parser.error(f"with --engine ray there must be one of --{', --'.join(READERS)}, and no copies or overlays")
        if any(map(is_stream, arguments.tables.values())):
            parser.error("with --engine ray the table is a folder; it cannot go to standard output or a pipe")
    return arguments


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


def list_pictures(arguments: argparse.Namespace, tables: Iterable[Path], *, quiet: bool = False) -> list[Path]:
    """The pictures that the command line names, without the copies and heatmaps that an earlier run saved."""
    copies = [os.path.realpath(arguments.copy_to / verdict) + os.sep for verdict in VERDICTS if arguments.copy_to]
    overlays = [os.path.realpath(arguments.overlays) + os.sep] if arguments.overlays else []
    tables_at = {os.path.realpath(table): table for table in tables}
    search = search_from(arguments)
    paths, saved = list[Path](), 0
    for path in dict.fromkeys(file for name in expand_arguments(arguments.paths) for file in expand_path(name, search)):
        real = os.path.realpath(path)
        if real in tables_at:
            raise BadTable(f"{tables_at[real]} is one of the pictures.")
        if real.startswith(tuple(copies)) or (real.startswith(tuple(overlays)) and OVERLAY.search(real)):
            saved += 1
        else:
            paths.append(path)
    if quiet:
        return paths
    report_search(search, len(paths), tables)
    if saved:
        print(f"{_count(saved, 'picture')} in the folders for copies and heatmaps skipped", file=sys.stderr)
    return paths


def run(arguments: argparse.Namespace, stack: ExitStack) -> int:
    """Classify on this machine; `stack` closes the tables. Returns the exit code."""
    stopped = Event()
    if arguments.watch:
        stack.enter_context(interrupt_on_signals(stopped))
    tables_at = {kind: Path(file) for kind, file in arguments.tables.items()}
    for folder in [arguments.copy_to, arguments.overlays, *(file.parent for file in tables_at.values())]:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)  # fails before all work, not after it
    sidecars = None
    with optional_packages("requirements-library.txt"):
        if arguments.xmp:
            from photo_library.sidecars import Sidecars  # noqa: PLC0415

            sidecars = Sidecars(arguments.xmp_tag, arguments.xmp_style, arguments.xmp_only)
        if arguments.watch:
            from photo_library.watch import classify_new_pictures, signatures, watch_pictures  # noqa: PLC0415
    stack.enter_context(lock_tables(tables_at.values()))
    paths = list_pictures(arguments, tables_at.values())
    known = signatures(paths) if arguments.watch else {}
    if arguments.overlays:  # heatmaps need gradients
        classifier = load_with_torch(arguments.checkpoint, arguments.precision, arguments.device)
    else:
        classifier = load_fastest(arguments.checkpoint, arguments.precision, arguments.device)
    print(f"Engine: {describe_engine(classifier.network)}", file=sys.stderr)
    closing = stack.enter_context(ExitStack())
    tables = open_tables(tables_at, classifier.sha256, set(map(str, paths)), closing)
    job = Job(classifier, arguments.copy_to, arguments.overlays, sidecars, is_watch=arguments.watch)
    code = fill_tables(job, tables, paths)
    if not arguments.watch:
        return code
    print("Watching for new pictures. Press Ctrl-C to stop.", file=sys.stderr)
    search = partial(list_pictures, arguments, tables_at.values(), quiet=True)
    with suppress(KeyboardInterrupt):
        classify_new_pictures(
            watch_pictures([Path(path) for path in arguments.paths], search, known, stopped),
            partial(fill_tables, job),
            files=tables_at,
            sha256=classifier.sha256,
            tables=tables,
            closing=closing,
            classified=set(map(str, paths)),
        )
    print("Stopped watching.", file=sys.stderr)
    return 0


@contextmanager
def interrupt_on_signals(stopped: Event) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and on SIGTERM, with which services are stopped, and set the event.

    Python drops an exception that a signal raises while an object is being finalised; the event stays.
    """

    def interrupt(_number: int, _frame: object) -> None:
        stopped.set()
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fill_tables(job: Job, tables: OpenTables, paths: list[Path]) -> int:
    """Classify pictures, save their copies, heatmaps and sidecars, and write the rows that the tables lack.

    Args:
        job: the classifier, and what to save.
        tables: as `open_tables` returns them.
        paths: of the pictures.

    Returns:
        The exit code.
    """
    done = {path: row for path, row in tables[0][1].items() if all(path in rows for _, rows in tables)}
    if job.overlays:
        done = {path: row for path, row in done.items() if os.path.exists(overlay_path(job.overlays, Path(path)))}  # noqa: PTH110  (Path.exists can raise)
    todo = [path for path in paths if str(path) not in done]
    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo)} of {_count(len(paths), 'picture')} were classified before", file=sys.stderr)
    unsaved_before = copy_classified(job.copies, paths, done, job.files) if job.copies else 0
    if job.sidecars:
        unsaved_before += job.sidecars.write_classified(paths, done, job.classifier.sha256)
    classified = failed = 0
    for path, answer, unsaved in tqdm(classify_and_save(job, todo), total=len(todo), unit="picture"):
        if job.is_watch and isinstance(answer, BadImage) and not os.path.lexists(path):
            continue
        row = row_of(str(path), answer, job.classifier.sha256)
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


def remove_xmp_tags(arguments: argparse.Namespace) -> int:
    """Remove our tags from the sidecars of the pictures. Returns the exit code."""
    with optional_packages("requirements-library.txt"):
        from photo_library.sidecars import remove_all_tags  # noqa: PLC0415
    changed, failed = remove_all_tags(list_pictures(arguments, []))
    print(f"Tags removed from {_count(changed, 'sidecar')}, {_count(failed, 'picture')} failed", file=sys.stderr)
    return 1 if failed else 0


def run_on_cluster(arguments: argparse.Namespace) -> int:
    """Classify with Ray. Returns the exit code."""
    with optional_packages("requirements-cluster.txt"):
        from cluster import BadAddress, classify_on_cluster, is_address, list_pictures_at  # noqa: PLC0415
    ((kind, target),) = arguments.tables.items()
    search = search_from(arguments)
    try:
        paths = dict.fromkeys(
            path
            for name in expand_arguments(arguments.paths)
            for path in (list_pictures_at(name, search) if is_address(name) else map(str, expand_path(name, search)))
        )
        report_search(search, len(paths), [])
        with lock_tables([] if is_address(target) else [Path(target)]):
            options = {"precision": arguments.precision, "device": arguments.device}
            return summarize(*classify_on_cluster(paths, arguments.checkpoint, target, kind, **options))
    except BadAddress as error:
        return refuse(str(error))


def refuse(sentence: str) -> int:
    """Print why nothing was done, as argparse does; return the exit code."""
    print(f"classify.py: error: {sentence}", file=sys.stderr)
    return 2


def summarize(classified: int, failed: int) -> int:
    """Print how many pictures were classified and how many failed; return the exit code."""
    print(f"{_count(classified, 'picture')} classified, {_count(failed, 'file')} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
