"""The decisions with a clock of their own; the notifications with real folders."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from images import find_pictures
from photo_library import watch
from photo_library.watch import RESCAN_SECONDS, SETTLE_SECONDS, notifications, signatures, watch_pictures


class Clock:
    """Time that passes only when a test says so, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.plan: list[tuple[float, bool, Callable[[], object]]] = []

    def then(self, seconds: float, happens: Callable[[], object] = lambda: None, *, notified: bool = False) -> None:
        """Let some time pass, and something happen, with a notification or not."""
        self.plan.append((seconds, notified, happens))

    def notifications(self, _folders: list[Path]) -> Iterator[bool]:
        """What `watch.notifications` would give; it ends with the plan."""
        for seconds, notified, happens in self.plan:
            self.now += seconds
            happens()
            yield notified


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch, "notifications", made.notifications)
    monkeypatch.setattr(time, "monotonic", lambda: made.now)
    return made


def watched(folder: Path, known: dict[Path, watch.Signature] | None = None) -> list[list[str]]:
    """The names that a watch gives until the clock's plan ends."""
    found = watch_pictures([folder], lambda: find_pictures(folder), {} if known is None else known)
    return [sorted(path.name for path in batch) for batch in found]


def test_a_picture_is_given_once_when_it_has_settled(tmp_path: Path, clock: Clock) -> None:
    picture = tmp_path / "a.jpg"
    clock.then(0.5, lambda: picture.write_bytes(b"half"), notified=True)
    clock.then(SETTLE_SECONDS * 0.9)
    clock.then(
        0.5, lambda: picture.write_bytes(b"the whole"), notified=True
    )  # a download that had stopped for a moment
    clock.then(SETTLE_SECONDS * 0.9)
    before = len(clock.plan)
    assert watched(tmp_path) == []
    del clock.plan[:before]
    clock.then(0, notified=True)
    clock.then(SETTLE_SECONDS)
    clock.then(RESCAN_SECONDS * 2)
    assert watched(tmp_path) == [["a.jpg"]]


def test_many_at_once_are_one_batch(tmp_path: Path, clock: Clock) -> None:
    def copy_all() -> None:
        for number in range(1000):
            (tmp_path / f"{number}.jpg").touch()

    clock.then(0.5, copy_all, notified=True)
    clock.then(SETTLE_SECONDS)
    clock.then(SETTLE_SECONDS)
    (batch,) = watched(tmp_path)
    assert len(batch) == 1000


def test_a_watch_ends_when_it_is_stopped(tmp_path: Path, clock: Clock) -> None:
    """Even if Python has dropped the KeyboardInterrupt."""
    stopped = Event()
    clock.then(0.5, (tmp_path / "a.jpg").touch, notified=True)
    clock.then(SETTLE_SECONDS, stopped.set)
    clock.then(SETTLE_SECONDS, lambda: pytest.fail("it went on"))
    assert list(watch_pictures([tmp_path], lambda: find_pictures(tmp_path), {}, stopped)) == []


def test_a_download_counts_from_its_last_name(tmp_path: Path, clock: Clock) -> None:
    partial = tmp_path / "a.jpg.crdownload"
    clock.then(0.5, lambda: partial.write_bytes(b"half"), notified=True)
    clock.then(2 * SETTLE_SECONDS, notified=True)
    clock.then(0.5, lambda: partial.rename(tmp_path / "a.jpg"), notified=True)
    clock.then(SETTLE_SECONDS)
    assert watched(tmp_path) == [["a.jpg"]]


def test_what_is_deleted_before_it_settles_is_not_given(tmp_path: Path, clock: Clock) -> None:
    picture = tmp_path / "a.jpg"
    clock.then(0.5, picture.touch, notified=True)
    clock.then(SETTLE_SECONDS, picture.unlink)
    clock.then(SETTLE_SECONDS)
    assert watched(tmp_path) == []


def test_known_pictures_are_given_only_if_they_have_changed(tmp_path: Path, clock: Clock) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"old")
    known = signatures(find_pictures(tmp_path))
    clock.then(0.5, lambda: (tmp_path / "b.jpg").write_bytes(b"newer"), notified=True)
    clock.then(SETTLE_SECONDS)
    clock.then(RESCAN_SECONDS * 2)
    assert watched(tmp_path, known) == [["b.jpg"]]


def test_a_drive_that_comes_back_is_not_answered_again(tmp_path: Path, clock: Clock) -> None:
    drive, elsewhere = tmp_path / "drive", tmp_path / "elsewhere"
    drive.mkdir()
    (drive / "a.jpg").write_bytes(b"old")
    known = signatures(find_pictures(drive))
    clock.then(0.5, lambda: drive.rename(elsewhere), notified=True)
    clock.then(SETTLE_SECONDS)
    clock.then(0.5, lambda: (elsewhere / "b.jpg").write_bytes(b"new"))
    clock.then(0.5, lambda: elsewhere.rename(drive), notified=True)
    clock.then(SETTLE_SECONDS)
    assert watched(drive, known) == [["b.jpg"]]


def test_changes_without_a_notification_are_found_later(tmp_path: Path, clock: Clock) -> None:
    clock.then(1)
    clock.then(1, (tmp_path / "a.jpg").touch)
    clock.then(RESCAN_SECONDS)
    clock.then(SETTLE_SECONDS)
    assert watched(tmp_path) == [["a.jpg"]]


def test_a_search_that_takes_long_is_not_repeated_all_the_time(clock: Clock) -> None:
    searches: list[float] = []

    def search() -> list[Path]:
        searches.append(clock.now)
        clock.now += 5
        return []

    for _ in range(400):
        clock.then(0.5, notified=True)
    assert list(watch_pictures([], search, {})) == []
    assert 3 <= len(searches) <= (clock.now - 1000) * watch.MAX_SCAN_SHARE / 5 + 1


@pytest.fixture
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "TICK_MILLISECONDS", 50)


def next_notification(messages: Iterator[bool]) -> bool:
    """Wait for a notification; return False if none comes."""
    end = time.monotonic() + 60
    return any(notified or time.monotonic() > end for notified in messages) and time.monotonic() <= end


@pytest.mark.usefixtures("short_ticks")
def test_new_files_in_new_folders_send_notifications(tmp_path: Path) -> None:
    messages = notifications([tmp_path])
    assert next(messages)  # what was there before anyone watched
    (tmp_path / "album").mkdir()
    assert next_notification(messages)
    (tmp_path / "album" / "a.jpg").touch()
    assert next_notification(messages)


@pytest.mark.usefixtures("short_ticks")
def test_our_own_files_send_no_notification(tmp_path: Path) -> None:
    messages = notifications([tmp_path])
    next(messages)
    (tmp_path / "a.jpg.xmp").touch()
    (tmp_path / ".1.partial").touch()
    assert not any(next(messages) for _ in range(10))


@pytest.mark.usefixtures("short_ticks")
def test_folders_may_vanish_and_come_back(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    messages = notifications([one, other])
    next(messages)
    for gone in ([one], [one, other]):
        for folder in gone:
            shutil.rmtree(folder)
        for _ in range(5):
            next(messages)  # goes on without them
        for folder in gone:
            folder.mkdir()
        assert next_notification(messages)
        for _ in range(5):
            next(messages)
        (one / "a.jpg").touch()
        assert next_notification(messages)


@pytest.mark.usefixtures("short_ticks")
def test_without_notifications_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when there are more folders than the system's limit of watches."""

    def refused(*_arguments: object, **_options: object) -> Iterator[set[object]]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(watch, "watch", refused)
    messages = notifications([tmp_path])
    assert [next(messages) for _ in range(3)] == [True, False, False]
    assert "searching every 60 s" in capsys.readouterr().err
