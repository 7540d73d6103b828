"""What visits may hold on the server, and for how long."""

import asyncio
import atexit
import ctypes
import gc
import os
from collections import Counter, deque
from contextlib import suppress
from functools import cache
from threading import Event, Lock
from typing import Self

import streamlit as st
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from streamlit.runtime import exists, get_instance
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx

from gallery import MAX_TOTAL_MEGABYTES

MAX_BODY = MAX_TOTAL_MEGABYTES * 1_000_000  # of one request to the HTTP interface
MAX_SESSION_BYTES = 2 * MAX_BODY  # so that who chooses too many pictures still sees the first ones answered
MAX_HELD_BYTES = 1_000_000_000  # by all visits and requests; the page holds each upload twice
UPLOAD_PATH = "/_stcore/upload_file/"  # then the visit and the file
RETRY_AFTER = "5"  # seconds
DOWNLOAD_GRACE_SECONDS = 10  # seconds for a download that has been made
M_ARENA_MAX = -8  # glibc's malloc.h

# All are process-wide and set once. An upload of more than 1 MB would go to a temporary file; ours stay in memory.
MultiPartParser.spool_max_size = MAX_BODY + 1
with suppress(OSError, AttributeError):  # of glibc, which keeps what is freed apart for up to 8 threads on each core
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
gc.freeze()  # what is imported by now stays anyway, and would take each collection below 0.2 seconds
atexit.register(gc.unfreeze)


class FairSemaphore:
    """A semaphore that is handed to whoever has waited longest.

    Python's own is taken by whoever comes first once it is free: by the next picture of the very gallery that freed
    it, again and again, while somebody with one picture waits.
    """

    def __init__(self, count: int) -> None:
        self.free = count  # 0 while anybody waits
        self.waiting: deque[Event] = deque()
        self.lock = Lock()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take a core, having waited for it if need be; whether there was one."""
        with self.lock:
            if self.free:
                self.free -= 1
                return True
            if not blocking:
                return False
            mine = Event()
            self.waiting.append(mine)
        mine.wait()
        return True

    def release(self) -> None:
        """Give a core back."""
        with self.lock:
            if self.waiting:
                self.waiting.popleft().set()
            else:
                self.free += 1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@cache
def core_semaphore() -> FairSemaphore:
    """One picture per core at a time, on the page and over HTTP: an open large picture can hold some 500 MB."""
    return FairSemaphore(os.cpu_count() or 1)


def release_session_when_closed() -> None:
    """Have all that this visit holds freed soon after it ends; to be called in each run of the page's script.

    Streamlit keeps a visit for those who come back after a moment without network, and frees it when
    somebody else leaves after `server.disconnectedSessionTTL`: on a quiet server, never.
    """
    _visit()


def _on_session_closed(visit: str) -> None:
    # Half of the time, for when that is over Streamlit no longer finds the visit itself.
    patience = st.get_option("server.disconnectedSessionTTL") / 2
    asyncio.get_running_loop().call_later(patience, _release_session, visit)


def _release_session(visit: str) -> None:
    if exists() and not get_instance().is_active_session(visit):
        get_instance().close_session(visit)
        _trim()
        # That only marked what was made for downloads, and somebody else may be about to fetch such a file.
        asyncio.get_running_loop().call_later(DOWNLOAD_GRACE_SECONDS, _remove_orphaned_files)


def _remove_orphaned_files() -> None:
    get_instance().media_file_mgr.remove_orphaned_files()
    _trim()


def _trim() -> None:
    gc.collect()  # a visit's parts refer to each other
    with suppress(OSError, AttributeError):  # of glibc, which keeps what is freed
        ctypes.CDLL(None).malloc_trim(0)


@st.cache_resource(scope="session", on_release=_on_session_closed, show_spinner=False)
def _visit() -> str:
    context = get_script_run_ctx()
    return context.session_id if context else ""


class UploadLimits:
    """Refuses what would be more than one visit, or all together, may hold."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.arriving: Counter[str] = Counter()  # bytes, by visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 for a visit that holds too much, 503 if all of them do; else go on."""
        if scope["type"] != "http" or scope["method"] not in ("PUT", "POST"):
            await self.app(scope, receive, send)
            return
        length = Request(scope).headers.get("content-length", "")
        size = min(int(length), MAX_BODY) if length.isdecimal() else MAX_BODY
        path = scope["path"]
        visit = path.removeprefix(UPLOAD_PATH).partition("/")[0] if path.startswith(UPLOAD_PATH) else ""
        held = held_bytes_by_session()
        if visit and held[visit] + self.arriving[visit] + size > MAX_SESSION_BYTES:
            sentence = f"The limit for one visit is {MAX_SESSION_BYTES // 1_000_000} MB."
            await JSONResponse({"error": sentence}, 413)(scope, receive, send)
        elif held.total() + self.arriving.total() + size > MAX_HELD_BYTES:
            sentence = "Too many pictures are being looked at. Try again in a few seconds."
            await JSONResponse({"error": sentence}, 503, {"Retry-After": RETRY_AFTER})(scope, receive, send)
        else:
            self.arriving[visit] += size
            try:
                await self.app(scope, receive, send)
            finally:
                self.arriving[visit] -= size
                self.arriving += Counter()  # drops visits at zero


def held_bytes_by_session() -> Counter[str]:
    """Bytes of uploads that the page holds, by visit."""
    held: Counter[str] = Counter()
    if exists() and isinstance(manager := get_instance().uploaded_file_mgr, MemoryUploadedFileManager):
        for visit, files in list(manager.file_storage.items()):
            held[visit] = sum(len(file.data) for file in list(files.values()))
    return held
