"""Reduce a PNG to what its pixels depend on, so that Pillow reads it as browsers do.

Section numbers are those of the PNG specification, third edition.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

PNG_START = b"\x89PNG\r\n\x1a\n"
ANCILLARY = 0x20  # bit of a chunk's first letter (section 5.4)
# The ancillary chunks that the pixels or the orientation depend on, and their least length in bytes.
KEPT = {b"tRNS": 1, b"eXIf": 1, b"acTL": 8, b"fcTL": 26, b"fdAT": 4}
GREY, TRUE_COLOUR = 0, 2  # colour types (section 11.2.1)

Chunk = tuple[bytes, bytes]  # its type and its content


def essential_png(data: bytes) -> bytes:
    """Rewrite a PNG without metadata, with its transparent colour and its animation as Pillow expects them.

    Raises:
        ValueError: if a critical chunk is damaged.
    """
    chunks = _shown_animation(list(_joined_pixels(_kept_chunks(data))))
    parts = [PNG_START]
    for kind, content in _joined_pixels(chunks):  # again, because an animation's frame may have become pixels
        check = zlib.crc32(content, zlib.crc32(kind))
        parts += struct.pack(">I4s", len(content), kind), content, struct.pack(">I", check)
    return b"".join(parts)


def _kept_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks that matter; skip metadata without unpacking it.

    As in libpng, a wrong checksum makes an ancillary chunk ignored and a critical one an error.
    """
    depth, colour_type = data[24:26]
    at = len(PNG_START)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        is_critical = not kind[0] & ANCILLARY
        if is_critical or kind in KEPT:
            content = data[at + 8 : at + 8 + length]
            check = data[at + 8 + length : at + 12 + length]
            is_intact = int.from_bytes(check) == zlib.crc32(content, zlib.crc32(kind))
            if is_critical and not is_intact and len(check) == 4:  # Pillow itself judges a file that ends here
                raise ValueError(f"wrong checksum of {kind!r}")
            if kind == b"tRNS" and colour_type in (GREY, TRUE_COLOUR):
                content = _scaled_samples(content, depth, colour_type)
            if is_critical or (is_intact and len(content) >= KEPT[kind]):
                yield kind, content
        at += 12 + length
        if kind == b"IEND":
            return


def _joined_pixels(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Put chunks of pixels that follow each other into one, because Pillow takes long for a million empty ones."""
    for kind, group in groupby(chunks, itemgetter(0)):
        contents = [content for _, content in group]
        for content in [b"".join(contents)] if kind == b"IDAT" else contents:
            yield kind, content


def _scaled_samples(content: bytes, depth: int, colour_type: int) -> bytes:
    """Scale a transparent colour as Pillow scales the pixels: to 8 bits, except grey of 16 bits."""
    count = 1 if colour_type == GREY else 3
    if len(content) < 2 * count:
        return b""
    top = 2**depth - 1
    samples = [sample & top for sample in struct.unpack_from(f">{count}H", content)]
    if depth < 16:
        samples = [sample * 255 // top for sample in samples]
    elif colour_type == TRUE_COLOUR:  # Pillow keeps 8 bits of 16, so close colours become transparent, too
        samples = [sample >> 8 for sample in samples]
    return struct.pack(f">{count}H", *samples)


def _shown_animation(chunks: list[Chunk]) -> list[Chunk]:
    """Put an animation's first frame in the place of a still image that is no part of it, as browsers do.

    The animation ends at the first gap in its sequence numbers, where a damaged chunk was left out.
    """
    intact, number = list[Chunk](), 0
    for kind, content in chunks:
        if kind in (b"fcTL", b"fdAT"):
            number = number + 1 if int.from_bytes(content[:4]) == number else -1  # which nothing equals
            if number < 0:
                continue
        intact.append((kind, content))
    kinds = [kind for kind, _ in intact]
    still = kinds.index(b"IDAT")
    first, second, *_ = [at for at, kind in enumerate(kinds) if kind == b"fcTL"] + [len(kinds)] * 2
    if b"acTL" not in kinds[:still] or first == len(kinds):
        return [chunk for chunk in intact if chunk[0] not in (b"acTL", b"fcTL", b"fdAT")]
    if first < still or b"fdAT" not in kinds[first:second]:
        return intact
    frame = [(b"IDAT", content[4:]) for kind, content in intact[first:second] if kind == b"fdAT"]
    later = [
        (kind, (int.from_bytes(content[:4]) - len(frame)).to_bytes(4) + content[4:])
        for kind, content in intact[second:]
        if kind in (b"fcTL", b"fdAT")
    ]
    return [*(chunk for chunk in intact[: first + 1] if chunk[0] != b"IDAT"), *frame, *later, (b"IEND", b"")]
