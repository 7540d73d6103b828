"""What visits leave behind, and what they may hold: real sessions with the real server."""

import asyncio
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

import pytest
from pictures import ROOT, encode, noise
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed

import sessions
from benchmarks.load import Shown, Visitor
from benchmarks.page import resident, running_server


def padded(seed: int) -> bytes:
    """A picture of 9 MB, where web servers have long begun to use temporary files."""
    return encode(noise(900, 600, seed), "JPEG") + bytes(9_000_000)  # what is behind its end is no part of a JPEG


async def ask(address: str, pictures: list[bytes]) -> list[Shown]:
    async with Visitor(address) as visitor:
        return [await visitor.ask("picture.jpg", picture) for picture in pictures]


def test_a_core_goes_to_whoever_has_waited_longest() -> None:
    cores = sessions.FairSemaphore(1)
    order: list[str] = []

    def look(who: str) -> None:
        with cores:
            order.append(who)

    assert cores.acquire()
    assert not cores.acquire(blocking=False)
    others = [threading.Thread(target=look, args=(who,)) for who in ("first", "second")]
    for number, other in enumerate(others, 1):
        other.start()
        while len(cores.waiting) < number:
            time.sleep(0.01)
    cores.release()
    look("a gallery's next picture")
    for other in others:
        other.join()
    assert order == ["first", "second", "a gallery's next picture"]
    assert cores.acquire(blocking=False)


# Sixteen threads at once take some memory; then glibc lists the arenas that it keeps memory in.
TAKE_AND_LIST = """
import ctypes, threading
import sessions

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(16)

def take():
    together.wait()
    libc.malloc(1000)
    together.wait()

threads = [threading.Thread(target=take) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
listing = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, listing)
libc.fclose(listing)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_one_thread_frees_is_of_use_to_the_others() -> None:
    listed = subprocess.run([sys.executable, "-c", TAKE_AND_LIST], cwd=ROOT, capture_output=True, text=True, check=True)
    assert listed.stdout.count("<heap nr=") == 2  # without `visits`, one for each thread


def no_files() -> None:
    """Let this process write to no file: any attempt fails, even to what pytest keeps of its output."""
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_uploads_never_touch_the_disk() -> None:
    with running_server(prepare=no_files) as (address, _):
        (shown,) = asyncio.run(ask(address, [padded(0)]))
    assert shown.verdict
    assert not shown.errors


def test_who_leaves_takes_the_memory_along(monkeypatch: pytest.MonkeyPatch) -> None:
    async def visit() -> tuple[float, float]:
        async with AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(Visitor(address)) for _ in range(20)]
            await visitors[0].ask("first.jpg", padded(0))  # loads the network
            before = resident(process)
            for number, visitor in enumerate(visitors[1:]):
                await visitor.rerun(await visitor.upload("mine.jpg", padded(number)))
            return before, resident(process)

    monkeypatch.setenv("STREAMLIT_SERVER_DISCONNECTED_SESSION_TTL", "4")  # seconds, not minutes
    with running_server() as (address, process):
        before, full = asyncio.run(visit())
        assert full > before + 19 * 9 * 0.9
        end = time.monotonic() + 30
        while resident(process) > before + 0.2 * (full - before) and time.monotonic() < end:
            time.sleep(0.5)
        assert resident(process) < before + 0.2 * (full - before)


def test_killed_in_mid_upload_it_comes_back_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def upload() -> None:
        async with Visitor(address) as visitor:
            threading.Timer(0.3, os.kill, (process, signal.SIGKILL)).start()
            while True:  # one after the other, so that it dies in one of them
                await visitor.ask("half.jpg", padded(0))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running_server() as (address, process), pytest.raises((OSError, ConnectionClosed, HTTPException)):
        asyncio.run(upload())
    assert not list(tmp_path.iterdir())
    with running_server() as (address, _):
        (shown,) = asyncio.run(ask(address, [padded(0)]))
    assert shown.verdict


def test_a_visit_that_sends_without_end_is_stopped() -> None:
    """Files that the page's script never asks for, as no browser would send them."""

    async def send() -> None:
        async with Visitor(address) as greedy, Visitor(address) as other:
            with pytest.raises(OSError, match=r"413|reset|Broken pipe"):
                for number in range(40):
                    await greedy.upload(f"{number}.jpg", padded(number))
            assert sessions.MAX_SESSION_BYTES / 9.1e6 - 1 < number < sessions.MAX_SESSION_BYTES / 9e6
            assert (await other.ask("mine.jpg", padded(0))).verdict

    with running_server("serve.py") as (address, _):
        asyncio.run(send())


def test_the_limit_of_a_visit_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "held_bytes_by_session", lambda: Counter({"greedy": 195_000_000}))
    client = TestClient(sessions.UploadLimits(Response()))
    statuses = [
        client.put(f"{sessions.UPLOAD_PATH}{who}/1", content=bytes(9_000_000)).status_code for who in ("greedy", "b")
    ]
    assert statuses == [413, 200]
    assert client.put(f"{sessions.UPLOAD_PATH}greedy/2", content=bytes(1_000)).status_code == 200
    assert client.get(f"{sessions.UPLOAD_PATH}greedy/2").status_code == 200


@pytest.mark.parametrize("length", ["90000000", None])
def test_all_together_hold_no_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch, length: str | None) -> None:
    """Requests that arrive slowly count as if they were there."""
    statuses: list[int] = []

    async def slow(_: Request) -> Response:
        if len(statuses) < 20:
            statuses.append(client.post("/slow", headers=headers).status_code)
        return Response()

    monkeypatch.setattr(sessions, "MAX_HELD_BYTES", 500_000_000)
    client = TestClient(sessions.UploadLimits(Route("/slow", slow, methods=["POST"])))
    headers = {"content-length": length} if length else {"transfer-encoding": "chunked"}
    assert client.post("/slow", headers=headers).status_code == 200
    room = 5  # of 90 or, unknown, 100 MB
    assert sorted(statuses) == [200] * (room - 1) + [503]
    statuses.clear()
    assert client.post("/slow", headers=headers).status_code == 200  # what is over no longer counts
    assert 200 in statuses
