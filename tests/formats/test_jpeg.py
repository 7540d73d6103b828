import re
from typing import Any

import numpy as np
import pytest
from pictures import encode, noise
from PIL import Image

from images import MAX_MISSING, BadImage, open_picture

END = b"\xff\xd9"
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "restarts in each row": {"restart_marker_rows": 1},
    "restarts in each block": {"restart_marker_blocks": 1},
    "progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
}


def detailed(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with detail everywhere, so that each part of its file says something."""
    grain = np.random.default_rng(seed).normal(0, 20, (height, width, 3))
    return Image.fromarray((np.asarray(noise(width, height, seed)) + grain).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (400, 300), (2300, 330)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_end_marker_is_not_needed(kind: str, size: tuple[int, int]) -> None:
    whole = encode(detailed(*size), "JPEG", **KINDS[kind])
    assert whole.endswith(END)
    for cut in (1, 2):
        opened = open_picture(whole[:-cut])
        assert opened.tobytes() == open_picture(whole).tobytes()
        assert not opened.info["warning"]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_nor_in_other_modes(mode: str) -> None:
    for options in KINDS.values():
        if mode == "CMYK" or "subsampling" not in options:
            whole = encode(detailed(90, 70).convert(mode), "JPEG", **options)
            assert open_picture(whole[:-2]).tobytes() == open_picture(whole).tobytes()


def test_nor_before_padding() -> None:
    whole = encode(detailed(400, 300), "JPEG")
    for padding in (1, 63, 512, 5000):
        opened = open_picture(whole[:-2] + bytes(padding))
        assert opened.tobytes() == open_picture(whole).tobytes()
        assert not opened.info["warning"]


def test_what_follows_the_end_marker_does_not_matter() -> None:
    whole = encode(detailed(400, 300), "JPEG")
    for garbage in (bytes(1000), b"garbage", np.random.default_rng(0).bytes(5000), whole[:1000]):
        opened = open_picture(whole + garbage)
        assert opened.tobytes() == open_picture(whole).tobytes()
        assert not opened.info["warning"]


@pytest.mark.parametrize("kind", ["baseline", "optimized", "4:4:4", "restarts in each row"])
def test_a_small_missing_part_is_said_and_a_larger_one_refused(kind: str) -> None:
    whole = encode(detailed(320, 320), "JPEG", **KINDS[kind])
    outcomes = []
    for share in (0.004, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.2, 0.5, 0.9):
        part = whole[: round(len(whole) * (1 - share))]
        try:
            (percent,) = map(int, re.findall(r"(\d+)%", open_picture(part).info["warning"]))
        except BadImage as error:
            assert "damaged or incomplete" in str(error)
            outcomes.append("refused")
        else:
            assert percent <= 100 * MAX_MISSING
            outcomes.append("warned")
    assert outcomes == sorted(outcomes, reverse=True)
    assert len(set(outcomes)) == 2


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_padding_in_the_place_of_rows_does_not_make_it_whole(share: float) -> None:
    whole = encode(detailed(320, 320), "JPEG")
    with pytest.raises(BadImage, match="damaged or incomplete"):
        open_picture(whole[: round(len(whole) * share)].ljust(len(whole), b"\0"))


@pytest.mark.parametrize("colour", [(128, 128, 128), (255, 255, 255), (0, 0, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_may_end_in_one_colour(kind: str, colour: tuple[int, int, int]) -> None:
    picture = detailed(320, 320)
    picture.paste(colour, (0, 150, 320, 320))
    whole = encode(picture, "JPEG", **KINDS[kind])
    for data in (whole, whole[:-2]):
        opened = open_picture(data)
        assert opened.tobytes() == open_picture(whole).tobytes()
        assert not opened.info["warning"]


@pytest.mark.parametrize("kind", ["progressive", "progressive with restarts"])
def test_a_progressive_jpeg_that_lacks_scans_is_refused(kind: str) -> None:
    whole = encode(detailed(320, 320), "JPEG", **KINDS[kind])
    scans = [found.start() for found in re.finditer(rb"\xff\xda", whole)]
    assert len(scans) > 5
    for at in (*scans[1:], len(whole) // 2, len(whole) * 3 // 4):
        with pytest.raises(BadImage, match="damaged or incomplete"):
            open_picture(whole[:at])
    # Of the last scan, a little may be missing.
    assert "%" in open_picture(whole[: -(len(whole) - scans[-1]) // 50]).info["warning"]


def test_a_jpeg_that_ends_in_its_headers_is_refused() -> None:
    whole = encode(detailed(64, 64), "JPEG")
    for length in range(3, whole.index(b"\xff\xda") + 10, 7):
        with pytest.raises(BadImage, match="damaged or incomplete"):
            open_picture(whole[:length])
