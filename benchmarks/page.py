"""Measure the running page: python -m benchmarks.page, or take the README's screenshots: --screenshots

Starts the real server and a Chromium that is already installed (Linux, requirements-dev.txt). Measuring
uploads 12-megapixel photos in one session, and prints how long answers take, from the upload to the
heatmap on the screen, and how much memory the server holds.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tqdm import trange

ROOT = Path(__file__).parent.parent
PHOTO_SIZE = (4000, 3000)
HEATMAP = "img[alt*='heatmap']"
TIMEOUT = 60_000  # ms


@contextmanager
def running_server(
    script: str = "app.py", prepare: Callable[[], None] | None = None, base_path: str = "", port: int = 0
) -> Iterator[tuple[str, int]]:
    """A script's server on a free port of this machine: its address and its process.

    Args:
        script: what Streamlit runs.
        prepare: called in the server's process before it starts.
        base_path: the path below which the server answers, like /memes.
        port: if not a free one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.headless=true"]
    server = subprocess.Popen(  # noqa: S603
        [*command, "--server.address=127.0.0.1", f"--server.port={port}", f"--server.baseUrlPath={base_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # for scripts in folders below
        stdout=sys.stderr,
        preexec_fn=prepare,  # noqa: PLW1509
    )
    address = f"http://127.0.0.1:{port}{base_path}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/_stcore/health").close()  # noqa: S310
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.1)
        yield address, server.pid
    finally:
        server.terminate()
        server.wait(60)  # seconds; a busy machine takes its time


@contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium that is already installed; `FileNotFoundError` without one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise FileNotFoundError("there is no Chromium on this machine")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    quiet.append("--disable-features=LocalNetworkAccessChecks")  # of a page whose headers a test has changed
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()


def photo(seed: int) -> bytes:
    """A 12-megapixel JPEG of a few megabytes, as much detail in it as a camera's."""
    draw = np.random.default_rng(seed)
    scene = Image.fromarray(draw.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(PHOTO_SIZE)
    grain = draw.normal(0, 9, (PHOTO_SIZE[1], PHOTO_SIZE[0], 1))
    buffer = BytesIO()
    Image.fromarray((np.asarray(scene) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def upload(page: Page, file: Path, data: bytes) -> float:
    """Upload a picture other than the last, from a file; seconds until its heatmap is on the screen."""
    file.write_bytes(data)
    remove = page.get_by_role("button", name="Remove all")
    if remove.count():  # else the two would make a gallery
        remove.click()
        page.locator(HEATMAP).wait_for(state="detached", timeout=TIMEOUT)
    started = time.monotonic()
    page.locator("input[type=file]").first.set_input_files(file)
    page.wait_for_function(
        """selector => {
            const image = document.querySelector(selector);
            return image && image.complete && image.naturalWidth;
        }""",
        arg=HEATMAP,
        timeout=TIMEOUT,
    )
    return time.monotonic() - started


def resident(process: int) -> float:
    """Resident memory of a process, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000


def measure(count: int) -> None:
    """Upload `count` photos to a warm page, one after another, and print a table."""
    photos = [photo(seed) for seed in range(4)]
    with running_server() as (address, process), chromium() as browser, TemporaryDirectory() as folder:
        # Choosing the same name again would be no change to the browser.
        files = [Path(folder) / f"photo{n}.jpg" for n in range(len(photos))]
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        started = time.monotonic()
        page.goto(address)
        page.locator("input[type=file]").first.wait_for(state="attached", timeout=TIMEOUT)
        first_page = time.monotonic() - started
        upload(page, files[0], photos[0])
        first_answer = time.monotonic() - started
        loaded = resident(process)
        # Bytes after a JPEG's end are no part of the picture, but make the file a new one.
        times = [
            upload(page, files[n % len(photos)], photos[n % len(photos)] + n.to_bytes(4))
            for n in trange(1, count + 1, unit="upload")
        ]
        after = resident(process)
    middle, slow = np.quantile(times, (0.5, 0.95))
    print(f"photo: {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]} JPEG, {len(photos[0]) / 1e6:.1f} MB")
    print(f"first visit to the upload area: {first_page:.1f} s; to the first heatmap: {first_answer:.1f} s")
    print(f"warm answer, upload to heatmap: median {middle:.2f} s, 95th percentile {slow:.2f} s")
    print(f"server's resident memory: {loaded:.0f} MB with the model loaded, {after:.0f} MB after {count} uploads")


def take_screenshots() -> None:
    """Save the page with a meme and with another picture, both from the examples, into outputs/."""
    with running_server() as (address, _), chromium() as browser:
        for example, name in (("Cat meme", "output.png"), ("Mountains", "output2.png")):
            page = browser.new_page(viewport={"width": 840, "height": 640})
            page.goto(address)
            page.get_by_role("button", name=example, exact=True).click(timeout=TIMEOUT)
            page.locator(f"[data-test-script-state=notRunning] {HEATMAP}").wait_for(timeout=TIMEOUT)
            page.wait_for_timeout(2000)  # for pictures to load and Streamlit's fading to end
            page.screenshot(path=ROOT / "outputs" / name)
            page.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="Measure the running page.")
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--screenshots", action="store_true", help="write outputs/output.png and output2.png instead")
    arguments = parser.parse_args()
    if arguments.screenshots:
        take_screenshots()
    else:
        measure(arguments.uploads)


if __name__ == "__main__":
    main()
