"""JPEGs that end early: read them to their end, and measure what is missing (ITU T.81)."""

import re
from collections.abc import Iterator
from io import BytesIO
from itertools import islice, takewhile

from PIL import Image, ImageChops

JPEG_START = b"\xff\xd8\xff"
END_MARKER = b"\xff\xd9"
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA  # codes of markers (table B.1)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # codes that start a frame; 0xF7 of JPEG-LS
MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")  # one that a segment follows, or the last
PROGRESSIVE = 0xC2
ARITHMETIC = (0xC9, 0xCA)
RESTARTS = [bytes((0xFF, code)) for code in range(0xD0, 0xD8)]
BLOCK = 8  # pixels along each side
LARGE = 4_000_000  # pixels; at the fraction at which more are decoded, the end of the last scan cannot be seen
COEFFICIENTS = 64  # of a block
NO_DATA = range(127, 130)  # levels where libjpeg has no data; converting colours may add or take one
NOISE = bytes(range(254, 191, -1))
PADDING = 64  # bytes; an interrupted copy may end in that many zeros, a picture hardly


class JpegFile(BytesIO):
    """A JPEG file that yields an end marker where its bytes run out.

    Attributes:
        ran_out: whether more bytes were read than there are, as decoders do if the end marker is missing.
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


def count_segments(data: bytes, most: int) -> int:
    """The number of a JPEG's segments before its first scan, or any greater number if there are more than `most`."""
    headers = takewhile(lambda segment: segment[1] != START_OF_SCAN, segments(data))
    return sum(1 for _ in islice(headers, most + 1))


def may_lack_rows(data: bytes, decoded: Image.Image) -> bool:
    """Whether a JPEG with an end marker is worth the cost of `missing_share`.

    Libjpeg leaves blocks without data grey, so the corner of a file of one scan shows whether rows are missing; a gap
    within the last block goes unnoticed. A file of several scans can lack data without a grey corner.
    """
    components = 0
    for _, marker, content in segments(data):
        if marker in FRAMES:
            components = content[5]
            height, width = int.from_bytes(content[1:3]), int.from_bytes(content[3:5])
            if marker in ARITHMETIC:
                return False  # it may leave out its last bytes
            if marker == PROGRESSIVE:
                return width * height < LARGE or _lacks_scans(data)
        elif marker == START_OF_SCAN:
            if content[0] < components:
                return True
            break
    corner = decoded.crop((decoded.width - 1, decoded.height - 1, *decoded.size))
    luma = corner.getchannel("K") if corner.mode == "CMYK" else corner.convert("L")  # of full resolution, unlike colour
    return luma.getpixel((0, 0)) in NO_DATA or data.endswith(bytes(PADDING) + END_MARKER)


def missing_share(data: bytes, decoded: Image.Image, draft_size: tuple[int, int]) -> float:
    """Measure which share of a JPEG's rows is missing, wholly or in part; all of them if a scan is missing.

    Libjpeg does not report missing data, so the file is continued with noise; rows that change are missing.
    This cannot be told of arithmetic coding.

    Args:
        data: the file.
        decoded: the picture as libjpeg decodes the file.
        draft_size: least width and height in pixels for which it was decoded, see `Image.draft`.
    """
    if _lacks_scans(data):
        return 1.0
    end, last_scan, height = len(data), 0, 1
    for at, marker, content in segments(data):
        if marker in ARITHMETIC:
            return 1.0
        if marker in FRAMES:
            height = int.from_bytes(content[1:3])
        elif marker == START_OF_SCAN:
            last_scan = at
        elif marker == END_OF_IMAGE:
            end = at
            break

    def missing_rows(end: int) -> int:
        continued = _decode_continued(data[:end], last_scan, draft_size)
        return height - _first_different_row(decoded, continued, height)

    rows = missing_rows(end)
    if data.endswith(bytes(PADDING), 0, end) and (rows or not missing_rows(end - PADDING // 2)):
        rows = missing_rows(len(data[:end].rstrip(b"\0")))  # the zeros are not the picture's
    return rows / height


def _lacks_scans(data: bytes) -> bool:
    """Whether no scan has the last bit of some coefficient."""
    expected, complete = set[tuple[int, int]](), set[tuple[int, int]]()  # coefficients of components
    for _, marker, content in segments(data):
        if marker in FRAMES:
            expected = {(component, number) for component in content[6::3] for number in range(COEFFICIENTS)}
        elif marker == START_OF_SCAN:
            count = content[0]
            first, last, approximation = content[1 + 2 * count : 4 + 2 * count]
            if not approximation & 15:
                components = content[1 : 1 + 2 * count : 2]
                complete |= {(component, number) for component in components for number in range(first, last + 1)}
        elif marker == END_OF_IMAGE:
            break
    return not expected <= complete


def _decode_continued(known: bytes, scan: int, draft_size: tuple[int, int]) -> Image.Image:
    """Decode a file whose last scan, at position `scan`, goes on with noise, which differs from any blank rest."""
    known = known.rstrip(b"\xff")  # which would make a marker of what follows
    last_restart = max(RESTARTS, key=lambda marker: known.rfind(marker, scan))
    is_first = last_restart not in known[scan:]
    due = RESTARTS[0 if is_first else (RESTARTS.index(last_restart) + 1) % len(RESTARTS)]
    file = BytesIO(known + NOISE + due + NOISE + END_MARKER)
    with Image.open(file, formats=("JPEG",)) as image:
        image.draft("RGB", draft_size)
        return image.copy()


def _first_different_row(one: Image.Image, other: Image.Image, height: int) -> int:
    """The first row, of `height` rows of the original, in which two drafts of it differ; `height` if none does."""
    box = ImageChops.difference(one, other).getbbox()
    if not box:
        return height
    scale = -(-height // one.height)
    # Where colour has half the resolution, libjpeg also interpolates the row above.
    is_interpolated = scale == 1 and box[1] % BLOCK == BLOCK - 1
    return (box[1] + is_interpolated) * scale
