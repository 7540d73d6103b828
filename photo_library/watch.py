"""Watch folders for new and changed pictures.

Notifications of the operating system (through watchfiles) only trigger a search of the folders, with the same rules as
in any other run. So a lost notification, a full queue or a network drive, which sends none, delays a picture but does
not lose it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import NamedTuple

from watchfiles import Change, watch
from watchfiles._rust_notify import WatchfilesRustInternalError

from tables import OpenTables, is_stream, open_tables, read_table

SETTLE_SECONDS = 2.0  # a file unchanged for so long is taken as complete; downloads and copies write more often
TICK_MILLISECONDS = 500
RESCAN_SECONDS = 60.0  # for changes without a notification
MAX_SCAN_SHARE = 0.1  # share of the time spent searching; a search of a large library may take seconds


class Signature(NamedTuple):
    """Size and time of a file; a change of its content changes one of them."""

    size: int
    modified_ns: int


class Unsettled(NamedTuple):
    """A file that is still being written, or was a moment ago."""

    signature: Signature
    since: float


def signatures(paths: list[Path]) -> dict[Path, Signature]:
    """The signatures of the files that exist."""
    found = dict[Path, Signature]()
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # gone again, or its drive is
            continue
        found[path] = Signature(status.st_size, status.st_mtime_ns)
    return found


def watch_pictures(
    folders: list[Path], search: Callable[[], list[Path]], known: dict[Path, Signature], stopped: Event | None = None
) -> Iterator[list[Path]]:
    """Yield pictures as they appear or change, in batches, until it is stopped.

    Args:
        folders: to watch, with all their sub-folders. They may vanish and come back.
        search: finds all pictures that exist now.
        known: the signatures of the pictures that were classified. It is kept up to date. A file that vanishes stays
            in it, so that nothing is classified again when a drive comes back.
        stopped: ends the watch when it is set.

    Yields:
        Pictures whose files have not changed for `SETTLE_SECONDS`.
    """
    unsettled = dict[Path, Unsettled]()
    last_scan, duration, is_requested = time.monotonic(), 0.0, True
    for notified in notifications(folders):
        if stopped and stopped.is_set():
            return
        is_requested = is_requested or notified
        now = time.monotonic()
        is_due = is_requested or unsettled or now - last_scan > RESCAN_SECONDS
        if not is_due or now - last_scan < duration / MAX_SCAN_SHARE:
            continue
        is_requested = False
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


def classify_new_pictures(
    batches: Iterator[list[Path]],
    classify: Callable[[OpenTables, list[Path]], int],
    *,
    files: dict[str, Path],
    sha256: str,
    tables: OpenTables,
    closing: ExitStack,
    classified: set[str],
) -> None:
    """Classify pictures as they appear, without end, and keep one row for each in the tables.

    Args:
        batches: of pictures, as `watch_pictures` yields them.
        classify: classifies pictures and writes their rows to tables.
        files: paths of the tables by their kind.
        sha256: of the checkpoint.
        tables: open, with the rows of the first pass.
        closing: closes them.
        classified: paths of the pictures of the first pass. It is kept up to date.
    """
    kept = {kind: file for kind, file in files.items() if not is_stream(file)}
    in_tables = {row.path for kind, file in kept.items() for row in read_table(file, kind, sha256)}
    for paths in batches:
        names = set(map(str, paths))
        if names & in_tables:  # a changed picture's row is replaced; one that is not newer than its row keeps it
            closing.close()
            tables = open_tables(files, sha256, names, closing, again=names & classified)
        classify(tables, paths)
        classified |= names
        in_tables |= names if kept else set()


def notifications(folders: list[Path]) -> Iterator[bool]:
    """Yield about twice a second whether something has happened in the folders, which may vanish and come back."""
    while True:
        there = folder_identities(folders)
        try:
            for notified in _system_notifications([folder for folder, identity in there.items() if identity]):
                yield notified
                if folder_identities(folders) != there:
                    break
        except FileNotFoundError:  # it vanished meanwhile
            continue
        except (OSError, WatchfilesRustInternalError) as error:  # more folders than the system's limit
            print(
                f"No notifications from the system ({error}): searching every {RESCAN_SECONDS:.0f} s", file=sys.stderr
            )
            notified = True
            while folder_identities(folders) == there:
                yield notified
                notified = False
                time.sleep(TICK_MILLISECONDS / 1000)


def folder_identities(folders: list[Path]) -> dict[Path, tuple[int, int] | None]:
    """Device and inode of the folder at each path, if any. A mounted drive differs from its mount point."""
    found = dict[Path, tuple[int, int] | None]()
    for folder in folders:
        try:
            status = folder.stat()
            found[folder] = (status.st_dev, status.st_ino)
        except OSError:
            found[folder] = None
    return found


def _system_notifications(folders: list[Path]) -> Iterator[bool]:
    """Yield True for each notification about folders that exist, and False for every half second without one.

    The first is True, because changes before the watch began must be found, too.
    """
    first = True
    if not folders:
        while True:
            time.sleep(TICK_MILLISECONDS / 1000)
            yield first
            first = False
    for changes in watch(
        *folders,
        watch_filter=_is_relevant,
        debounce=TICK_MILLISECONDS,
        step=TICK_MILLISECONDS // 5,
        rust_timeout=TICK_MILLISECONDS,
        yield_on_timeout=True,
        ignore_permission_denied=True,
    ):
        yield first or bool(changes)
        first = False


def _is_relevant(change: Change, path: str) -> bool:
    """Whether a notification may be about a new picture, and not about a file that this program writes."""
    return change != Change.deleted and not path.endswith((".partial", ".xmp"))
