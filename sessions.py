"""Limits on the memory that sessions hold, fair sharing of the cores, and clean-up after a session ends."""

import asyncio
import atexit
import ctypes
import gc
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from threading import Event, Lock
from typing import Self

import streamlit as st
from starlette.formparsers import MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from streamlit.runtime import exists, get_instance
from streamlit.runtime.media_file_manager import MediaFileManager
from streamlit.runtime.media_file_storage import MediaFileKind
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx

from engine import memory_limit, usable_cores
from gallery import MAX_TOTAL_MEGABYTES

MAX_BODY = MAX_TOTAL_MEGABYTES * 1_000_000  # bytes of one request to the HTTP API
MAX_SESSION_BYTES = 2 * MAX_BODY  # more than the page classifies, so that after too many uploads the first are answered
MAX_HELD_BYTES = min(
    1_000_000_000, memory_limit() / 8
)  # of all sessions and requests; the page holds each upload twice
NETWORK_BYTES = 1_000_000_000  # of the process with the network loaded
PICTURE_BYTES = 600_000_000  # at most while a picture is opened and classified: a WebP of 36 megapixels
UPLOAD_PATH = "/_stcore/upload_file/"  # after server.baseUrlPath; followed by session id and file id
RETRY_AFTER = "5"  # seconds
DOWNLOAD_GRACE_SECONDS = 10  # time for the browser to fetch a download that was just created
M_ARENA_MAX = -8  # glibc's malloc.h

clear_references = MediaFileManager.clear_session_refs


def _clear_references_but_hold_pictures(manager: MediaFileManager, session_id: str | None = None) -> None:
    """Clear a session's references to media files, but hold the pictures that its browser may be about to fetch.

    Streamlit clears the references when a run begins, and the run sets them again as it draws the page. In between,
    the end of any other session's run would delete the pictures. So a second reference holds the last picture of each
    place on the page. It is replaced by the picture that the following run showed there, and ends with the session.
    """
    context = get_script_run_ctx(suppress_warning=True)
    with manager._lock:
        references, files = manager._files_by_session_and_coord, manager._file_metadata
        if session_id:  # it has ended
            references.pop(f"{session_id} held", None)
        elif context:  # a run begins
            held = references[f"{context.session_id} held"]
            for place, file in references.get(context.session_id, {}).items():
                if file in files and files[file].kind == MediaFileKind.MEDIA:  # downloads are large and made on demand
                    held[place] = file
    clear_references(manager, session_id)


# These settings are process-wide. Starlette would write uploads above 1 MB to a temporary file; ours stay in memory.
MultiPartParser.spool_max_size = MAX_BODY + 1
MediaFileManager.clear_session_refs = _clear_references_but_hold_pictures  # type: ignore[assignment, method-assign]
with suppress(OSError, AttributeError):  # glibc only: by default, freed memory stays in up to 8 arenas per core
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
gc.freeze()  # imported modules are never freed, and scanning them would add 0.2 s to each collection
atexit.register(gc.unfreeze)


class FairSemaphore:
    """A first-in, first-out semaphore.

    `threading.Semaphore` has no order: a gallery that releases it can acquire it again for its next picture, over and
    over, while another session with one picture waits.
    """

    def __init__(self, count: int) -> None:
        self.free = count  # 0 while anyone waits
        self.waiting: deque[Event] = deque()
        self.lock = Lock()

    def acquire(self, *, blocking: bool = True) -> bool:
        """Acquire, and wait for it if `blocking`. Returns whether it was acquired."""
        with self.lock:
            if self.free:
                self.free -= 1
                return True
            if not blocking:
                return False
            turn = Event()
            self.waiting.append(turn)
        turn.wait()
        return True

    def release(self) -> None:
        """Release to whoever has waited longest."""
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
def pictures_at_once() -> int:
    """How many pictures may be open at the same time: one per core, or fewer if memory is short."""
    free = memory_limit() - NETWORK_BYTES - 2 * MAX_HELD_BYTES
    return int(max(1, min(usable_cores(), free // PICTURE_BYTES)))


@cache
def core_semaphore() -> FairSemaphore:
    """The semaphore that page and HTTP API share, with a place for each of `pictures_at_once`."""
    return FairSemaphore(pictures_at_once())


def release_session_when_closed() -> None:
    """Free everything that this session holds soon after it ends. Call it in each run of the page's script.

    Streamlit keeps a disconnected session so that the browser can reconnect, and frees it only when another session
    ends after `server.disconnectedSessionTTL`: on a quiet server, never.
    """
    _session_id()


def _on_session_closed(session_id: str) -> None:
    # Half of that time, because Streamlit itself can no longer find the session when it is over.
    delay = st.get_option("server.disconnectedSessionTTL") / 2
    asyncio.get_running_loop().call_later(delay, _release_session, session_id)


def _release_session(session_id: str) -> None:
    if exists() and not get_instance().is_active_session(session_id):
        get_instance().close_session(session_id)
        _trim_memory()
        # Closing only marks the files made for downloads, and another session may be about to fetch one of them.
        asyncio.get_running_loop().call_later(DOWNLOAD_GRACE_SECONDS, _remove_orphaned_files)


def _remove_orphaned_files() -> None:
    get_instance().media_file_mgr.remove_orphaned_files()
    _trim_memory()


def _trim_memory() -> None:
    gc.collect()  # the objects of a session form reference cycles
    with suppress(OSError, AttributeError):  # glibc only: it keeps freed memory for itself
        ctypes.CDLL(None).malloc_trim(0)


@st.cache_resource(scope="session", on_release=_on_session_closed, show_spinner=False)
def _session_id() -> str:
    context = get_script_run_ctx()
    return context.session_id if context else ""


class UploadLimitMiddleware:
    """Refuses uploads beyond what one session, or all sessions together, may hold in memory.

    Args:
        app: takes the others.
        origins: of pages whose scripts may read the refusals.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self.app = app
        self.origins = origins
        self.arriving: Counter[str] = Counter()  # bytes by session id; "" for the HTTP API

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 if the session would hold too much and 503 if all sessions would; otherwise call the app."""
        if scope["type"] != "http" or scope["method"] not in ("PUT", "POST"):
            await self.app(scope, receive, send)
            return
        length = Request(scope).headers.get("content-length", "")
        size = min(int(length), MAX_BODY) if length.isdecimal() else MAX_BODY
        session_id = scope["path"].partition(UPLOAD_PATH)[2].partition("/")[0]
        held = held_bytes_by_session()
        if session_id and held[session_id] + self.arriving[session_id] + size > MAX_SESSION_BYTES:
            sentence = f"The limit for one session is {MAX_SESSION_BYTES // 1_000_000} MB."
            await self._readable(JSONResponse({"error": sentence}, 413))(scope, receive, send)
        elif held.total() + self.arriving.total() + size > MAX_HELD_BYTES:
            sentence = "The server is handling too many pictures. Try again in a few seconds."
            refusal = JSONResponse({"error": sentence}, 503, {"Retry-After": RETRY_AFTER})
            await self._readable(refusal)(scope, receive, send)
        else:
            self.arriving[session_id] += size
            try:
                await self.app(scope, receive, send)
            finally:
                self.arriving[session_id] -= size
                self.arriving += Counter()  # removes sessions at zero

    def _readable(self, response: ASGIApp) -> ASGIApp:
        """The response with CORS headers, if there are such origins."""
        if not self.origins:
            return response
        return CORSMiddleware(response, allow_origins=self.origins, expose_headers=["Retry-After"])


def held_bytes_by_session() -> Counter[str]:
    """Bytes of uploads that the page holds, by session id."""
    held: Counter[str] = Counter()
    if exists() and isinstance(manager := get_instance().uploaded_file_mgr, MemoryUploadedFileManager):
        for session_id, files in list(manager.file_storage.items()):
            held[session_id] = sum(len(file.data) for file in list(files.values()))
    return held
