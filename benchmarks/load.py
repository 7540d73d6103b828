"""Many visitors at once on the running page: python -m benchmarks.load --visitors 1 4 16 32 --seconds 120

Each visitor is a WebSocket session that speaks Streamlit's own protocol and uploads one picture after the other.
Every answer, probability and heatmap is compared with what a single visitor got for the same picture, and every
picture shown is fetched. A page of the usual kind (`load_usual.py`) takes turns with ours. Linux only; needs
requirements-dev.txt.
"""

import argparse
import asyncio
import itertools
import math
import random
import time
import urllib.request
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from io import BytesIO
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError

import numpy as np
from PIL import Image
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.Common_pb2 import FileURLs, UploadedFileInfo
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from tqdm import tqdm
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.page import resident, running_server

ROOT = Path(__file__).parent.parent
PICTURES = 256
PAGES = {"ours": "serve.py", "one lock": "benchmarks/load_usual.py"}
SETTLED = 60  # seconds, after which memory should no longer grow
BLOCK = 20  # seconds
PATIENCE = 120  # seconds


@dataclass(frozen=True, slots=True)
class Shown:
    """What a visitor sees: the answer, and the addresses of the pictures, which are made of their content."""

    verdict: str
    probability: str
    pictures: tuple[str, ...]
    errors: tuple[str, ...]


@dataclass(slots=True)
class Visitor:
    """One session with the page at an address."""

    address: str
    socket: ClientConnection = field(init=False)
    token: str = field(init=False, default="")
    session: str = field(init=False, default="")
    uploader: str = field(init=False, default="")
    spinners: list[str] = field(init=False, default_factory=list)  # texts shown while the visitor waited
    missing: int = field(init=False, default=0)  # pictures that the server did not have when they were fetched

    async def __aenter__(self) -> Self:
        """Open the page."""
        response = await asyncio.to_thread(urllib.request.urlopen, f"{self.address}/_stcore/health")
        cookies = SimpleCookie(response.headers["Set-Cookie"])
        self.token = cookies["_streamlit_xsrf"].value if "_streamlit_xsrf" in cookies else ""
        self.socket = await connect(
            self.address.replace("http", "ws", 1) + "/_stcore/stream",
            subprotocols=["streamlit"],  # type: ignore[list-item]  # a plain string to all but the type checker
            additional_headers={"Cookie": f"_streamlit_xsrf={self.token}"},
            max_size=None,
        )
        await self.rerun(None)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave."""
        await self.socket.close()

    async def send(self, message: BackMsg) -> None:
        await self.socket.send(message.SerializeToString())

    async def receive(self) -> ForwardMsg:
        message = ForwardMsg()
        message.ParseFromString(await asyncio.wait_for(self.socket.recv(), PATIENCE))
        return message

    async def rerun(self, upload: UploadedFileInfo | None) -> Shown:
        """Let the page's script run with this upload or none, and read what it shows."""
        message = BackMsg()
        message.rerun_script.query_string = ""
        if upload:
            state = message.rerun_script.widget_states.widgets.add(id=self.uploader)
            state.file_uploader_state_value.uploaded_file_info.append(upload)
        await self.send(message)
        verdict = probability = ""
        pictures: list[str] = []
        errors: list[str] = []
        while True:
            received = await self.receive()
            kind = received.WhichOneof("type")
            if kind == "new_session":
                self.session = received.new_session.initialize.session_id or self.session
            elif kind == "script_finished":
                return Shown(verdict, probability, tuple(pictures), tuple(errors))
            elif kind == "delta" and received.delta.HasField("new_transient"):
                shown = [element.spinner.text for element in received.delta.new_transient.elements]
                self.spinners += [text for text in shown if text not in self.spinners]
            elif kind == "delta" and received.delta.HasField("new_element"):
                element = received.delta.new_element
                name = element.WhichOneof("type")
                if name == "file_uploader":
                    self.uploader = self.uploader or element.file_uploader.id
                elif name == "heading" and element.heading.tag == "h2":
                    verdict = element.heading.body
                elif name == "progress" and element.progress.text.startswith("Probability"):
                    probability = element.progress.text
                elif name == "imgs":
                    pictures += [image.url for image in element.imgs.imgs]
                elif name in ("alert", "exception"):
                    errors.append(str(element))

    async def ask(self, name: str, picture: bytes) -> Shown:
        """Upload a picture, read the answer, fetch what it shows, and remove the upload as browsers do."""
        upload = await self.upload(name, picture)
        shown = await self.rerun(upload)
        self.missing += await self.fetch(shown.pictures)
        await asyncio.to_thread(self.request, "DELETE", upload.file_urls.delete_url)
        return shown

    async def fetch(self, pictures: tuple[str, ...]) -> int:
        """Fetch pictures of the page as a browser does; returns how many the server does not have."""
        missing = 0
        for path in pictures:
            try:
                await asyncio.to_thread(self.request, "GET", path)
            except HTTPError as error:
                if error.code != 404:
                    raise
                missing += 1
        return missing

    async def upload(self, name: str, picture: bytes) -> UploadedFileInfo:
        """Upload a picture, which changes nothing on the page yet."""
        request = BackMsg()
        request.file_urls_request.request_id = name
        request.file_urls_request.session_id = self.session
        request.file_urls_request.file_names.append(name)
        await self.send(request)
        while (received := await self.receive()).WhichOneof("type") != "file_urls_response":
            pass
        (urls,) = received.file_urls_response.file_urls
        await asyncio.to_thread(self.put, urls, name, picture)
        return UploadedFileInfo(name=name, size=len(picture), file_id=urls.file_id, file_urls=urls)

    def put(self, urls: FileURLs, name: str, picture: bytes) -> None:
        """Send the file itself."""
        boundary = "a-picture-follows"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = head.encode() + picture + f"\r\n--{boundary}--\r\n".encode()
        self.request("PUT", urls.upload_url, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> None:
        """One HTTP request of this session."""
        cookies = {"X-Xsrftoken": self.token, "Cookie": f"_streamlit_xsrf={self.token}"}
        address = self.address + "/" + path.lstrip("/")
        request = urllib.request.Request(address, body, cookies | (headers or {}), method=method)  # noqa: S310
        with urllib.request.urlopen(request) as response:  # noqa: S310
            response.read()


def draw(seed: int) -> bytes:
    """One of many different JPEGs of 900 pixels: an example, turned, cropped and grainy."""
    generator = np.random.default_rng(seed)
    examples = sorted((ROOT / "examples").glob("*.jpg"))
    with Image.open(examples[seed % len(examples)]) as example:
        turned = example.rotate(float(generator.uniform(-15, 15)), expand=True).resize((900, 675))
    pixels = np.asarray(turned, np.float32) + generator.normal(0, 12, (675, 900, 1))
    buffer = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


@dataclass(slots=True)
class Tally:
    """What came of a crowd of visitors."""

    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    errors: int = 0
    missing: int = 0  # pictures that the page showed and the server no longer had
    memory: list[tuple[float, int, float]] = field(default_factory=list)  # seconds since the start, answers, MB

    def growth(self) -> str:
        """MB for each 1,000 answers once settled: least squares, with twice the standard error.

        Over the means of `BLOCK` seconds each: memory is taken and given back in steps that last many seconds, so
        the seconds themselves are no independent measurements, and would make the error far too small.
        """
        blocks: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for second, answers, megabytes in self.memory:
            if second >= SETTLED:
                blocks[int(second // BLOCK)].append((answers / 1000, megabytes))
        if len(blocks) < 6:
            return "–"
        answered, held = np.array([np.mean(block, 0) for block in blocks.values()]).T
        (slope, _), covariance = np.polyfit(answered, held, 1, cov=True)
        return f"{slope:.1f} ± {2 * covariance[0, 0] ** 0.5:.1f}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A server, the pictures that are uploaded to it, and what a visitor alone got for each."""

    address: str
    process: int
    pictures: list[bytes]
    alone: list[Shown]


async def visit(scene: Scene, end: float, seed: int, tally: Tally) -> None:
    """Upload pictures in an order of one's own until the end."""
    order = random.Random(seed).sample(range(len(scene.pictures)), len(scene.pictures))
    async with Visitor(scene.address) as visitor:
        for count, index in enumerate(itertools.cycle(order)):
            started = time.monotonic()
            shown = await visitor.ask(f"{seed}-{count}.jpg", scene.pictures[index])
            tally.errors += bool(shown.errors)
            tally.wrong += shown != scene.alone[index]
            tally.missing += visitor.missing
            visitor.missing = 0
            if time.monotonic() > end:  # the rate is that of answers in time
                return
            tally.seconds.append(time.monotonic() - started)


async def crowd(scene: Scene, count: int, seconds: float) -> Tally:
    """Let many visit at once, and watch the server's memory."""
    tally, started = Tally(), time.monotonic()
    visits = [asyncio.create_task(visit(scene, started + seconds, seed, tally)) for seed in range(count)]
    while not all(task.done() for task in visits):
        tally.memory.append((time.monotonic() - started, len(tally.seconds), resident(scene.process)))
        await asyncio.sleep(1)
    await asyncio.gather(*visits)
    return tally


async def meet(address: str, process: int, pictures: list[bytes]) -> Scene:
    """Ask for all pictures alone."""
    async with Visitor(address) as visitor:
        alone = [await visitor.ask(f"{n}.jpg", picture) for n, picture in enumerate(tqdm(pictures, desc="alone"))]
    assert len(set(alone)) == len(pictures)  # noqa: S101  (else a mixed answer could pass for a right one)
    return Scene(address, process, pictures, alone)


def measure(counts: list[int], seconds: float, pages: list[str]) -> None:
    """Print a line for each number of visitors and each page."""
    pictures = [draw(seed) for seed in range(PICTURES)]
    with ExitStack() as stack:
        scenes = {
            page: asyncio.run(meet(*stack.enter_context(running_server(PAGES[page])), pictures)) for page in pages
        }
        headings = (
            "page, visitors, answers, wrong, errors, missing, a second, median s, 95 % s, 99 % s, MB, MB per 1000"
        )
        print("|", headings.replace(", ", " | "), "|")
        print("|" + "---|" * 12)
        for count, page in itertools.product(counts, pages):
            tally = asyncio.run(crowd(scenes[page], count, seconds))
            middle, slow, slowest = np.quantile(tally.seconds or [math.nan], (0.5, 0.95, 0.99))  # none was in time
            cells: list[Any] = [page, count, len(tally.seconds), tally.wrong, tally.errors, tally.missing]
            cells += [f"{len(tally.seconds) / seconds:.1f}", f"{middle:.2f}", f"{slow:.2f}", f"{slowest:.2f}"]
            print("|", " | ".join(map(str, [*cells, f"{tally.memory[-1][2]:.0f}", tally.growth()])), "|", flush=True)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description="Measure the page with many visitors at once."
    )
    parser.add_argument("--visitors", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--seconds", type=float, default=120, help="for growing memory to show: at least 180")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES))
    arguments = parser.parse_args()
    measure(arguments.visitors, arguments.seconds, arguments.pages)


if __name__ == "__main__":
    main()
