import re
from io import BytesIO
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


def half_size(data: bytes) -> np.ndarray[Any, Any]:
    """A JPEG decoded at half its size, where libjpeg need not interpolate colours between rows."""
    with Image.open(BytesIO(data)) as image:
        image.draft("RGB", (image.width // 2, image.height // 2))
        return np.asarray(image)


def missing_rows(whole: bytes, cut: int) -> int:
    """The rows of the intact picture that come out differently, whatever follows the first `cut` bytes."""
    intact = half_size(whole)
    differs = np.zeros(len(intact), bool)
    for rest in (END, b"\x55" * 300 + END, b"\xbb" * 300 + END):
        differs |= (half_size(whole[:cut].rstrip(b"\xff") + rest) != intact).any((1, 2))
    return 2 * (len(differs) - int(differs.argmax())) if differs.any() else 0


def outcome(data: bytes) -> int | None:
    """The percentage that the warning names, 0 without a warning; None if the picture is refused."""
    try:
        warning = open_picture(data).info["warning"]
    except BadImage as error:
        assert "damaged or incomplete" in str(error)
        return None
    return int(re.findall(r"(\d+)%", warning)[0]) if warning else 0


@pytest.mark.parametrize("end", [b"", END])
@pytest.mark.parametrize("kind", ["baseline", "optimized", "4:4:4", "4:2:2", "restarts in each row", "progressive"])
def test_a_small_missing_part_is_said_and_a_larger_one_refused(kind: str, end: bytes) -> None:
    whole = encode(detailed(160, 640), "JPEG", **KINDS[kind])
    outcomes = []
    for share in (0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.2, 0.5, 0.9):
        cut = round(len(whole) * (1 - share))
        rows = missing_rows(whole, cut)
        outcomes.append(outcome(whole[:cut] + end))
        expected = None if rows > MAX_MISSING * 640 else max(1, round(100 * rows / 640))
        assert rows
        assert outcomes[-1] == expected, (share, rows)
    assert {None} < set(outcomes)


@pytest.mark.parametrize("end", [b"", END])
@pytest.mark.parametrize("height", [304, 312, 319, 320, 321, 336])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_five_percent_of_the_rows_may_be_missing_and_no_row_more(height: int, subsampling: int, end: bytes) -> None:
    picture = detailed(96, height)
    whole = encode(picture, "JPEG", subsampling=subsampling, restart_marker_rows=1)
    restarts = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", whole)]
    rows_each = 16 if subsampling else 8
    for number, at in enumerate(restarts, 1):
        missing = height - number * rows_each
        expected = None if 20 * missing > height else max(1, round(100 * missing / height))
        for cut in (at, at + 1, at + 2):  # before, in and behind the marker
            assert outcome(whole[:cut] + end) == expected, missing


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 3}, {"optimize": True}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_an_end_marker_behind_a_part_of_the_rows_does_not_make_it_whole(mode: str, options: dict[str, Any]) -> None:
    whole = encode(detailed(320, 320).convert(mode), "JPEG", **options)
    for share in (0.5, 0.9):
        assert outcome(whole[: round(len(whole) * share)] + END) is None
    for rest in (b"", b"\n", b"garbage" * 300):
        assert outcome(whole[: round(len(whole) * 0.98)] + END + rest)


@pytest.mark.parametrize("quality", [75, 100])  # with 100, the zeros are enough for all missing rows
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_zeros_between_the_rows_and_the_end_marker_do_not_make_it_whole(share: float, quality: int) -> None:
    whole = encode(detailed(320, 640), "JPEG", quality=quality)
    cut = round(len(whole) * share)
    percent = max(1, round(100 * missing_rows(whole, cut) / 640))
    assert outcome(whole[:cut].ljust(len(whole) - 2, b"\0") + END) == (None if percent > 5 else percent)


def a_scan_for_each_channel(picture: Image.Image) -> list[bytes]:
    """The parts of a sequential JPEG: its header, three scans and the end marker."""
    parts = []
    for channel in picture.convert("YCbCr").split():
        grey = encode(channel, "JPEG")
        parts.append(grey.partition(b"\xff\xda\0\x08\1\1"))
    header = parts[0][0]
    at = header.index(b"\xff\xc0") + 2  # the frame header (ITU T.81, B.2.2)
    frame = b"\0\x11" + header[at + 2 : at + 7] + b"\3" + b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    scans = [
        b"\xff\xda\0\x08\1" + bytes((number,)) + rest.removesuffix(END) for number, (_, _, rest) in enumerate(parts, 1)
    ]
    return [header[:at] + frame + header[at + 11 :], *scans, END]


@pytest.mark.parametrize("end", [b"", END])
def test_rows_of_one_channel_may_be_missing(end: bytes) -> None:
    picture = detailed(160, 320)
    header, *scans, _ = parts = a_scan_for_each_channel(picture)
    opened = open_picture(b"".join(parts))
    assert abs(np.asarray(opened, int) - np.asarray(picture)).mean() < 12
    assert not opened.info["warning"]
    last = len(scans[-1])
    assert outcome(b"".join((header, *scans)) + end) == 0
    assert outcome(b"".join((header, *scans))[: -last // 60] + end) in (2, 3, 4)
    assert outcome(b"".join((header, *scans))[: -last // 4] + end) is None
    assert outcome(b"".join((header, *scans[:2])) + end) is None


@pytest.mark.parametrize("height", [1999, 2003])
def test_rows_of_large_pictures_are_counted_at_full_size(height: int) -> None:
    whole = encode(detailed(height // 3, height), "JPEG", subsampling=0, restart_marker_rows=1)
    restarts = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", whole)]
    for number in (len(restarts), len(restarts) - 5):
        assert outcome(whole[: restarts[number - 1]] + END) == max(1, round(100 * (height - 8 * number) / height))
    most = next(number for number in range(len(restarts)) if 20 * (height - 8 * number) <= height)
    assert outcome(whole[: restarts[most - 1]] + END) == 5
    assert outcome(whole[: restarts[most - 2]] + END) is None


def test_zeros_at_the_end_may_be_the_picture() -> None:
    """A white lower half has codes of zeros only, if Huffman's tables are optimized."""
    found = 0
    for height in range(600, 664, 8):
        picture = detailed(400, height)
        picture.paste("white", (0, 100, 400, height))
        whole = encode(picture, "JPEG", optimize=True, subsampling=0)
        found += whole.endswith(bytes(64) + END)
        assert outcome(whole) == outcome(whole[:-2]) == 0
    assert found


def test_a_photo_with_its_end_marker_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("images.missing_share", measure)
    for kind in ("baseline", "4:4:4", "restarts in each row"):
        assert outcome(encode(detailed(320, 320), "JPEG", **KINDS[kind])) == 0


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


@pytest.mark.parametrize("end", [b"", END])
@pytest.mark.parametrize("kind", ["progressive", "progressive with restarts"])
def test_a_progressive_jpeg_that_lacks_scans_is_refused(kind: str, end: bytes) -> None:
    whole = encode(detailed(320, 320), "JPEG", **KINDS[kind])
    scans = [found.start() for found in re.finditer(rb"\xff\xda", whole)]
    assert len(scans) > 5
    for at in (*scans[1:], len(whole) // 2, len(whole) * 3 // 4):
        assert outcome(whole[:at] + end) is None
    # Of the last scan, a little may be missing.
    assert outcome(whole[: -(len(whole) - scans[-1]) // 50] + end)


def test_a_large_progressive_jpeg_is_decoded_once_but_may_lack_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(noise(2500, 1700), "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", whole)]
    for at in scans[1:]:
        assert outcome(whole[:at] + END) is None

    def decode(*_: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("formats.jpeg._decode_continued", decode)
    assert outcome(whole) == 0


def test_a_large_progressive_jpeg_may_not_end_in_its_last_scan() -> None:
    whole = encode(noise(2500, 1700), "JPEG", progressive=True)
    last_scan = len(whole) - whole.rindex(b"\xff\xda")
    assert outcome(whole[: -last_scan // 2]) is None
    assert outcome(whole[: -last_scan // 50])


def test_a_jpeg_that_ends_in_its_headers_is_refused() -> None:
    whole = encode(detailed(64, 64), "JPEG")
    for length in range(3, whole.index(b"\xff\xda") + 10, 7):
        with pytest.raises(BadImage, match="damaged or incomplete"):
            open_picture(whole[:length])
