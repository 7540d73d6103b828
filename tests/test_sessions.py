"""Memory and files of sessions: real sessions with the real server."""

import asyncio
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import pytest
from pictures import ROOT, encode, noise
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from streamlit.runtime import media_file_manager
from streamlit.runtime.media_file_manager import MediaFileManager
from streamlit.runtime.memory_media_file_storage import MemoryMediaFileStorage
from websockets.exceptions import ConnectionClosed

import sessions
from benchmarks.load import Shown, Visitor
from benchmarks.page import resident, running_server


def padded(seed: int) -> bytes:
    """A JPEG of 9 MB, far above the size at which web servers begin to use temporary files."""
    return encode(noise(900, 600, seed), "JPEG") + bytes(9_000_000)  # bytes after the end marker are ignored


def test_the_semaphore_is_first_in_first_out() -> None:
    cores = sessions.FairSemaphore(1)
    order: list[str] = []

    def acquire_and_note(who: str) -> None:
        with cores:
            order.append(who)

    assert cores.acquire()
    assert not cores.acquire(blocking=False)
    others = [threading.Thread(target=acquire_and_note, args=(who,)) for who in ("first", "second")]
    for number, other in enumerate(others, 1):
        other.start()
        while len(cores.waiting) < number:
            time.sleep(0.01)
    cores.release()
    acquire_and_note("a gallery's next picture")
    for other in others:
        other.join()
    assert order == ["first", "second", "a gallery's next picture"]
    assert cores.acquire(blocking=False)


# Sixteen concurrent threads allocate memory; then glibc lists its arenas.
ALLOCATE_AND_LIST_ARENAS = """
import ctypes, threading
import sessions

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(16)

def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
listing = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, listing)
libc.fclose(listing)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_two_arenas() -> None:
    listed = subprocess.run(
        [sys.executable, "-c", ALLOCATE_AND_LIST_ARENAS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.count("<heap nr=") == 2  # without `sessions`, one for each thread


@pytest.mark.parametrize(
    ("cores", "gigabytes", "expected"),
    [(2, 64, 2), (32, 64, 32), (32, 8, 8), (32, 4, 3), (32, 3, 2), (32, 1, 1), (2, 4, 2), (1, math.inf, 1)],
)
def test_fewer_pictures_are_open_where_memory_is_short(
    cores: int, gigabytes: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the cores, network, uploads and open pictures fit, but for a memory in which one hardly would."""
    memory = gigabytes * 1e9
    monkeypatch.setattr(sessions, "usable_cores", lambda: cores)
    monkeypatch.setattr(sessions, "memory_limit", lambda: memory)
    monkeypatch.setattr(sessions, "MAX_HELD_BYTES", min(1e9, memory / 8))
    sessions.pictures_at_once.cache_clear()
    count = sessions.pictures_at_once()
    sessions.pictures_at_once.cache_clear()
    assert count == expected
    if gigabytes >= 3:
        assert sessions.NETWORK_BYTES + 2 * sessions.MAX_HELD_BYTES + count * sessions.PICTURE_BYTES <= memory


def forbid_file_writes() -> None:
    """Make every write to a file fail in this process, even to the file in which pytest captures its output."""
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_uploads_never_touch_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that is killed during an upload leaves no file, and the next one answers without writing any."""

    async def upload() -> None:
        async with Visitor(address) as visitor:
            threading.Timer(0.3, os.kill, (process, signal.SIGKILL)).start()
            while True:  # one after the other, so that the server dies during one of them
                await visitor.ask("half.jpg", padded(0))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_server() as (address, process), pytest.raises((OSError, ConnectionClosed, HTTPException)):
        asyncio.run(upload())
    assert not list(tmp_path.iterdir())

    async def ask() -> Shown:
        async with Visitor(address) as visitor:
            return await visitor.ask("picture.jpg", padded(0))

    with running_server(prepare=forbid_file_writes) as (address, _):
        shown = asyncio.run(ask())
    assert shown.verdict
    assert not shown.errors


# Each run shows a new picture. A run that finds the file `wait` renames it to `waiting` and waits until it is gone.
SLOW_PAGE = """
import sys, time
from pathlib import Path

sys.path.insert(0, {root!r})
import numpy as np
import streamlit as st
import sessions

sessions.release_session_when_closed()
if Path({wait!r}).exists():
    Path({wait!r}).rename({waiting!r})
    while Path({waiting!r}).exists():
        time.sleep(0.02)
st.image(np.random.default_rng().integers(0, 256, (40, 40, 3), np.uint8))
"""


def test_pictures_stay_while_their_session_runs_and_another_one_ends(tmp_path: Path) -> None:
    """Streamlit deletes what no session refers to at the end of every run of every session."""
    wait, waiting, page = tmp_path / "wait", tmp_path / "waiting", tmp_path / "page.py"
    page.write_text(SLOW_PAGE.format(root=str(ROOT), wait=str(wait), waiting=str(waiting)))

    async def interleave() -> list[int]:
        async with Visitor(address) as slow:
            shown = await slow.rerun(None)
            wait.touch()
            run = asyncio.create_task(slow.rerun(None))
            while not waiting.exists():
                await asyncio.sleep(0.02)
            async with Visitor(address) as other:
                await other.rerun(None)
            missing_during_run = slow.missing + await slow.fetch(shown.pictures)
            waiting.unlink()
            later = await run
            assert later.pictures != shown.pictures
            return [len(shown.pictures), missing_during_run, await slow.fetch(later.pictures)]

    with running_server(str(page)) as (address, _):
        assert asyncio.run(interleave()) == [1, 0, 0]


def test_pictures_are_held_until_replaced_or_their_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryMediaFileStorage("/media")
    manager = MediaFileManager(storage)

    def run(session_id: str, place: str, picture: bytes, *, download: bool = False) -> str:
        """One run of a session's script that shows one picture, up to Streamlit's clean-up at its end."""
        context = SimpleNamespace(session_id=session_id)
        monkeypatch.setattr(sessions, "get_script_run_ctx", lambda **_: context)
        monkeypatch.setattr(media_file_manager, "_get_session_id", lambda: session_id)
        manager.clear_session_refs()
        address = manager.add(picture, "image/png", place, is_for_static_download=download)
        manager.remove_orphaned_files()
        return address.rpartition("/")[2]

    def is_there(file: str) -> bool:
        return file.partition(".")[0] in storage._files_by_id

    first = run("a", "here", b"1")
    elsewhere = run("a", "there", b"2")  # a run that was stopped before it came to the first place
    assert is_there(first)
    second = run("a", "here", b"3")
    run("a", "here", b"4")
    assert not is_there(first)
    assert is_there(second)
    run("b", "here", b"5")
    manager.clear_session_refs("a")  # it ends
    download = run("b", "file", b"6", download=True)
    assert not is_there(second)
    assert not is_there(elsewhere)
    for _ in range(3):  # Streamlit marks a download before it deletes it
        run("b", "here", b"5")
    assert not is_there(download)


def test_a_closed_session_frees_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def upload_and_leave() -> tuple[float, float]:
        async with AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(Visitor(address)) for _ in range(12)]
            await visitors[0].ask("first.jpg", padded(0))  # loads the network
            before = resident(process)
            for number, visitor in enumerate(visitors[1:]):
                await visitor.rerun(await visitor.upload("mine.jpg", padded(number)))
            return before, resident(process)

    monkeypatch.setenv("STREAMLIT_SERVER_DISCONNECTED_SESSION_TTL", "2")  # seconds, not minutes
    with running_server() as (address, process):
        before, full = asyncio.run(upload_and_leave())
        assert full > before + 11 * 9 * 0.9
        end = time.monotonic() + 30
        while resident(process) > before + 0.2 * (full - before) and time.monotonic() < end:
            time.sleep(0.5)
        assert resident(process) < before + 0.2 * (full - before)


def test_a_session_cannot_upload_without_end(address: str) -> None:
    """Uploads that the page never asked for, as no browser sends them."""

    async def send() -> None:
        async with Visitor(address) as greedy, Visitor(address) as other:
            with pytest.raises(OSError, match=r"413|reset|Broken pipe"):
                for number in range(40):
                    await greedy.upload(f"{number}.jpg", padded(number))
            assert sessions.MAX_SESSION_BYTES / 9.1e6 - 1 < number < sessions.MAX_SESSION_BYTES / 9e6
            assert (await other.ask("mine.jpg", padded(0))).verdict

    asyncio.run(send())


@pytest.mark.parametrize("base_path", ["", "/memes", "/in/a/folder"])
def test_the_limit_of_a_session_affects_no_other(base_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = base_path + sessions.UPLOAD_PATH
    monkeypatch.setattr(sessions, "held_bytes_by_session", lambda: Counter({"greedy": 195_000_000}))
    client = TestClient(sessions.UploadLimitMiddleware(Response()))
    statuses = [client.put(f"{uploads}{who}/1", content=bytes(9_000_000)).status_code for who in ("greedy", "b")]
    assert statuses == [413, 200]
    assert client.put(f"{uploads}greedy/2", content=bytes(1_000)).status_code == 200
    assert client.get(f"{uploads}greedy/2").status_code == 200


@pytest.mark.parametrize("length", ["90000000", None])
def test_all_sessions_together_have_a_limit(monkeypatch: pytest.MonkeyPatch, length: str | None) -> None:
    """Requests that are still arriving count with their full length."""
    statuses: list[int] = []

    async def slow(_: Request) -> Response:
        if len(statuses) < 20:
            statuses.append(client.post("/slow", headers=headers).status_code)
        return Response()

    monkeypatch.setattr(sessions, "MAX_HELD_BYTES", 500_000_000)
    client = TestClient(sessions.UploadLimitMiddleware(Route("/slow", slow, methods=["POST"])))
    headers = {"content-length": length} if length else {"transfer-encoding": "chunked"}
    assert client.post("/slow", headers=headers).status_code == 200
    room = 5  # of 90 or, unknown, 100 MB
    assert sorted(statuses) == [200] * (room - 1) + [503]
    statuses.clear()
    assert client.post("/slow", headers=headers).status_code == 200  # finished requests no longer count
    assert 200 in statuses
