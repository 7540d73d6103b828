"""Watch folders for new and changed pictures.

The operating system's messages (through watchfiles) only say when to look. What is new is found by searching the
folders again, with the same rules as any other run, so that a lost message, a full queue or a network drive, which
sends none, delays a picture but does not lose it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeAlias

from watchfiles import Change, watch
from watchfiles._rust_notify import WatchfilesRustInternalError

from tables import Row, Table, is_stream, open_tables, read_table

SETTLE_SECONDS = 2.0  # a file that has not changed for so long is complete: downloads and copies write more often
TICK_MILLISECONDS = 500
RESCAN_SECONDS = 60.0  # for what no message came of
MAX_SCAN_SHARE = 0.1  # of the time; a search of a large library may take seconds

OpenTables: TypeAlias = list[tuple[Table, dict[str, Row]]]  # as `tables.open_tables` returns them


class Signature(NamedTuple):
    """What changes when a file's content does."""

    size: int
    modified_ns: int


class Unsettled(NamedTuple):
    """A file that is being written, or was until a moment ago."""

    signature: Signature
    since: float


def signatures(paths: list[Path]) -> dict[Path, Signature]:
    """The signatures of the files that are there."""
    found = dict[Path, Signature]()
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # gone again, or its drive is
            continue
        found[path] = Signature(status.st_size, status.st_mtime_ns)
    return found


def watch_pictures(
    folders: list[Path], search: Callable[[], list[Path]], known: dict[Path, Signature]
) -> Iterator[list[Path]]:
    """Give pictures as they appear or change, in batches, without end.

    Args:
        folders: to be watched, with all their sub-folders. They may vanish and come back.
        search: finds all pictures that are there now.
        known: the signatures of the pictures that were answered. It is kept up to date. A file that vanishes stays
            in it, so that nothing is answered again when a drive comes back.

    Yields:
        Pictures whose files have not changed for `SETTLE_SECONDS`.
    """
    unsettled = dict[Path, Unsettled]()
    last_scan, duration, asked = time.monotonic(), 0.0, True
    for told in wake_ups(folders):
        asked = asked or told
        now = time.monotonic()
        due = asked or unsettled or now - last_scan > RESCAN_SECONDS
        if not due or now - last_scan < duration / MAX_SCAN_SHARE:
            continue
        asked = False
        found = signatures(search())
        last_scan = time.monotonic()
        duration = last_scan - now
        before, unsettled = unsettled, {}
        for path, signature in found.items():
            if known.get(path) != signature:
                file = before.get(path)
                unchanged = file is not None and file.signature == signature
                unsettled[path] = file if file and unchanged else Unsettled(signature, now)
        settled = [path for path, file in unsettled.items() if now - file.since >= SETTLE_SECONDS]
        if settled:
            for path in settled:
                known[path] = unsettled.pop(path).signature
            yield settled


def answer_new_pictures(
    batches: Iterator[list[Path]],
    answer: Callable[[OpenTables, list[Path]], int],
    *,
    files: dict[str, Path],
    sha256: str,
    tables: OpenTables,
    closing: ExitStack,
    answered: set[str],
) -> None:
    """Answer pictures as they come, without end, and keep one row for each in the tables.

    Args:
        batches: of pictures, as `watch_pictures` yields them.
        answer: classifies pictures and writes their rows to tables.
        files: paths of the tables by their kind.
        sha256: of the checkpoint.
        tables: open, with the rows of the first pass.
        closing: closes them.
        answered: paths of the pictures of the first pass.
    """
    kept = {kind: file for kind, file in files.items() if not is_stream(file)}
    in_tables = {row.path for kind, file in kept.items() for row in read_table(file, kind, sha256)}
    for paths in batches:
        names = set(map(str, paths))
        if names & in_tables:  # a changed picture's row is replaced; one that is not newer than its row keeps it
            closing.close()
            tables = open_tables(files, sha256, names, closing, again=names & answered)
        answer(tables, paths)
        answered |= names
        in_tables |= names if kept else set()


def wake_ups(folders: list[Path]) -> Iterator[bool]:
    """Say about twice a second whether something has happened in some folders, which need not exist all the time."""
    while True:
        there = folder_identities(folders)
        try:
            for told in _messages([folder for folder, identity in there.items() if identity]):
                yield told
                if folder_identities(folders) != there:
                    break
        except FileNotFoundError:  # it vanished after that question
            continue
        except (OSError, WatchfilesRustInternalError) as error:  # more folders than the system's limit
            print(f"No messages from the system ({error}): searching every {RESCAN_SECONDS:.0f} s", file=sys.stderr)
            told = True
            while folder_identities(folders) == there:
                yield told
                told = False
                time.sleep(TICK_MILLISECONDS / 1000)


def folder_identities(folders: list[Path]) -> dict[Path, tuple[int, int] | None]:
    """Which folder lies at each path, if any. A mounted drive is another folder than the place for it."""
    found = dict[Path, tuple[int, int] | None]()
    for folder in folders:
        try:
            status = folder.stat()
            found[folder] = (status.st_dev, status.st_ino)
        except OSError:
            found[folder] = None
    return found


def _messages(folders: list[Path]) -> Iterator[bool]:
    """The system's messages about folders that exist, and False every half a second without one.

    The first is True: what has happened before anyone watched is to be looked for.
    """
    first = True
    if not folders:
        while True:
            time.sleep(TICK_MILLISECONDS / 1000)
            yield first
            first = False
    for changes in watch(
        *folders,
        watch_filter=_may_be_news,
        debounce=TICK_MILLISECONDS,
        step=TICK_MILLISECONDS // 5,
        rust_timeout=TICK_MILLISECONDS,
        yield_on_timeout=True,
        ignore_permission_denied=True,
    ):
        yield first or bool(changes)
        first = False


def _may_be_news(change: Change, path: str) -> bool:
    """Whether a message may be about a new picture, and not about what this program writes itself."""
    return change != Change.deleted and not path.endswith((".partial", ".xmp"))
