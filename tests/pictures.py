"""Pictures that the tests draw themselves."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured blobs, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Encode a picture as the bytes of a file."""
    buffer = BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes, *, broken: bool = False) -> bytes:
    """A chunk of a PNG, with a wrong checksum if broken (PNG specification, section 5.3)."""
    check = zlib.crc32(content, zlib.crc32(kind)) ^ broken
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks."""
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def png_file(*chunks: bytes) -> bytes:
    """A PNG of these chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
