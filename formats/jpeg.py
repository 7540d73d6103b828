"""JPEGs that end early: read them to their end, and measure what is missing (ITU T.81)."""

import re
from collections.abc import Iterator
from io import BytesIO
from typing import cast

from PIL import Image, ImageChops

JPEG_START = b"\xff\xd8\xff"
END_MARKER = b"\xff\xd9"
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA  # codes of markers (table B.1)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # codes that start a frame; 0xF7 of JPEG-LS
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # one that a segment follows, or the last
BLOCK = 8  # pixels along each side
COEFFICIENTS = 64  # of a block
PADDING = 64  # bytes; an interrupted copy may end in that many zeros, a picture hardly


class JpegFile(BytesIO):
    """A JPEG file that yields an end marker where its bytes run out.

    Attributes:
        ran_out: whether somebody read on after the last byte, as decoders do if the end marker is missing.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ran_out = False

    def read(self, size: int | None = -1, /) -> bytes:
        part = super().read(size)
        if part or not size or self.ran_out:
            return part
        self.ran_out = True
        return END_MARKER


def segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the position, the marker's code and the content of each segment. What scans encode is skipped."""
    at = len(JPEG_START) - 1
    while found := MARKER.search(data, at):
        length = int.from_bytes(data[found.end() : found.end() + 2])
        yield found.start(), found[1][0], data[found.end() + 2 : found.end() + length]
        at = found.end() + length


def missing_share(data: bytes, draft_size: tuple[int, int]) -> float:
    """Measure which share of a JPEG's area its data does not determine.

    Libjpeg does not report missing data, so the file is continued with two different noises; whatever differs then is
    missing. All of it is, where whole scans are.

    Args:
        data: the file.
        draft_size: least width and height in pixels to decode it at, see `Image.draft`.
    """
    end = len(data.rstrip(b"\0") if data.endswith(bytes(PADDING)) else data)
    expected, complete = set[tuple[int, int]](), set[tuple[int, int]]()  # coefficients of components
    height, rows = 1, BLOCK
    for at, marker, content in segments(data):
        if marker in FRAMES:
            height = int.from_bytes(content[1:3])
            rows = BLOCK * max(sampling & 15 for sampling in content[7::3])
            expected = {(component, number) for component in content[6::3] for number in range(COEFFICIENTS)}
        elif marker == START_OF_SCAN:
            count = content[0]
            first, last, approximation = content[1 + 2 * count : 4 + 2 * count]
            if not approximation & 15:  # else a later scan has their last bit
                components = content[1 : 1 + 2 * count : 2]
                complete |= {(component, number) for component in components for number in range(first, last + 1)}
        elif marker == END_OF_IMAGE:
            end = at
            break
    if not expected <= complete:
        return 1.0
    known = data[:end].rstrip(b"\xff")  # which would make a marker of what follows
    ones, others = (_decode_continued(known, noise, draft_size) for noise in (range(1, 64), range(254, 191, -1)))
    difference = ImageChops.difference(ones, others)
    if not (box := difference.getbbox()):
        return 0.0
    width, top = difference.width, box[1]
    left = cast(tuple[int, ...], difference.crop((0, top, width, top + 1)).getbbox())[0]
    rows = min(difference.height - top, rows * difference.height // height)
    return 1 - (top * width + left * rows) / (width * difference.height)


def _decode_continued(known: bytes, noise: range, draft_size: tuple[int, int]) -> Image.Image:
    restarts = (bytes((0xFF, 0xD0 + number)) for number in range(8))  # one of them may be due
    file = BytesIO(known + b"".join(bytes(noise) + restart for restart in restarts) + bytes(noise) + END_MARKER)
    with Image.open(file, formats=("JPEG",)) as image:
        image.draft("RGB", draft_size)
        return image.copy()
