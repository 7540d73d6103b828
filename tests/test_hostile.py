"""Each hostile file is answered or refused in one sentence, within limits of time and memory."""

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError

import pytest
from hostile import ENCODINGS, hostile_files
from httpx2 import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import ROOT, encode, noise
from PIL import Image

from benchmarks.load import Shown, Visitor
from gallery import classify_upload
from images import SHORT_SIDE, SHOWN_SIDE, WHOLE_SIDE, BadImage, open_picture
from model import Classifier, Prediction

SECONDS = 2
MEGABYTES = 500
READABLE = {
    "16-bit.png", "cmyk.jpg", "jpeg-inside.png", "archive-behind.png", "script-behind.gif", "page-in-comment.jpg",
    "broken-profile.jpg", "broken-profile.webp", "within-the-pixels.png", "long.png", "many-texts.png",
    "frames.gif", "frames.png", "frames.webp", "large-frames.gif", "more-pixels.png", "giant-metadata.jpg",
    "exif-in-itself.jpg", "exif-far-away.jpg", "text-bomb.png", "profile-bomb.png", "empty-chunks.png",
    *(f"orientation-{name}-loop.jpg" for name in ("short", "zero", "nine", "large", "text")),
}  # fmt: skip


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return dict(hostile_files())


def outcome(content: bytes) -> str:
    """The error sentence for a file; empty if it opens."""
    try:
        picture = open_picture(content)
    except BadImage as error:
        return str(error)
    assert picture.mode == "RGB"
    assert max(picture.size) <= SHOWN_SIDE or min(picture.size) <= SHORT_SIDE
    picture.tobytes()
    del picture
    whole = open_picture(content, whole=True).size
    assert max(whole) <= WHOLE_SIDE or min(whole) <= SHORT_SIDE
    return ""


def test_each_hostile_file_opens_or_gets_a_sentence(files: dict[str, bytes]) -> None:
    outcomes = {name: outcome(content) for name, content in files.items()}
    assert {name for name in outcomes if not outcomes[name] and not name.startswith("truncated")} == READABLE
    for sentence in outcomes.values():
        assert not sentence or (sentence.startswith("This ") and sentence.endswith(".") and len(sentence) < 200)


def test_the_hostile_animations_have_their_frames(files: dict[str, bytes]) -> None:
    for name in ("frames.gif", "frames.png", "frames.webp"):
        with Image.open(BytesIO(files[name])) as animation:
            assert animation.n_frames == 10_000  # type: ignore[attr-defined]


def test_no_hostile_file_takes_long_or_much_memory(files: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, str(ROOT / "tests" / "opening_cost.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    costs = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert costs.keys() == files.keys()
    *_, before = costs["empty.png"]
    assert not {
        name: (code, seconds, megabytes)
        for name, (code, seconds, megabytes) in costs.items()
        if code or seconds > SECONDS or megabytes - before > MEGABYTES
    }


def test_hostile_files_that_open_are_classified(files: dict[str, bytes], tiny_classifier: Classifier) -> None:
    for name in READABLE:
        assert isinstance(classify_upload(tiny_classifier, name, files[name]).answer, Prediction)


NAMES = ("../../etc/passwd.png", "<script>a</script>**b**:red[c].png", "😀🏳️.png", "a\u202egnp.exe.png", "a%00b.png")


def test_names_change_no_answer(address: str, server_tmp: Path) -> None:
    """A file's name changes no answer, on the page or over HTTP. How names are shown is tested in test_gallery.py."""

    async def upload(address: str, name: str) -> Shown:
        async with Visitor(address) as visitor:
            return await visitor.ask(name, picture)

    picture = encode(noise(90, 60))
    with Client(base_url=address, timeout=60) as client:
        answers = {name: asyncio.run(upload(address, name)) for name in (*NAMES, "plain.png")}
        assert len(set(answers.values())) == 1
        assert answers["plain.png"].verdict
        for name in NAMES:
            response = client.post("/api/classify", files=[("pictures", (name, picture))])
            assert response.json()["pictures"][0]["name"] == name
        endless = client.post("/api/classify", files=[("pictures", ("x" * 5000 + ".png", picture))])
        assert endless.status_code == 422
        assert endless.json()["error"].startswith("The body cannot be read")
        with pytest.raises(HTTPError, match="400"):
            asyncio.run(upload(address, "x" * 5000 + ".png"))
    assert not list(server_tmp.iterdir())


SEEDS = [encode(noise(side, 40, side), name) for name in ENCODINGS for side in (33, 200)]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file, changed in one to six random places."""
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(content) - 1))
        # Decoders read the headers first, so most mutations happen there.
        at = at if draw(st.booleans()) else at % 200 % len(content)
        length = draw(st.integers(1, 64))
        mutation = draw(st.sampled_from(("overwrite", "bits", "remove", "repeat", "insert", "splice")))
        if mutation == "overwrite":
            extremes = st.sampled_from((b"\0", b"\xff", b"\x7f\xff", b"\xff\xff\xff\xff", b"\x80\0\0\0"))
            new = draw(st.one_of(st.binary(min_size=1, max_size=8), extremes))
            content[at : at + len(new)] = new
        elif mutation == "bits":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif mutation == "remove":
            del content[at : at + length]
        elif mutation == "repeat":
            content[at:at] = content[at : at + length] * draw(st.integers(1, 50))
        elif mutation == "insert":
            content[at:at] = random.Random(draw(st.integers(0, 2**32))).randbytes(length)
        else:
            other = draw(st.sampled_from(SEEDS))
            content[at:] = other[draw(st.integers(0, len(other) - 1)) :]
        if not content:
            break
    return bytes(content)


@settings(deadline=SECONDS * 1000, max_examples=5_000, suppress_health_check=list(HealthCheck), database=None)
@given(mutated())
def test_mutated_files_open_or_get_a_sentence(content: bytes) -> None:
    outcome(content)


if __name__ == "__main__":  # for longer: PYTHONPATH=. python tests/test_hostile.py SECONDS
    rounds, end = 0, time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        test_mutated_files_open_or_get_a_sentence()
        rounds += 1
    print(f"{rounds} rounds of 5,000 files without a failure")
