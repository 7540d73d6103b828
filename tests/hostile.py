"""Write hostile files into a folder: python tests/hostile.py FOLDER

The files are built byte by byte, or by changing a picture that Pillow has encoded.
"""

import random
import struct
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pillow_heif
from pictures import encode, noise
from PIL import Image

SIDE = 48
ENCODINGS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
PNG_START = b"\x89PNG\r\n\x1a\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file."""
    pillow_heif.register_heif_opener()
    plain = {name: encode(noise(SIDE, SIDE), name) for name in ENCODINGS}
    yield from bombs(plain)
    yield from odd_shapes()
    for name, content in plain.items():
        for percent in range(0, 100, 5):
            yield f"truncated-{percent}.{name.lower()}", content[: len(content) * percent // 100]
    yield from disguises(plain)
    yield from metadata(plain)
    yield from animations()
    yield from colours(plain["PNG"])


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG (RFC 2083, section 3.2)."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes = b"", *, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG with any header, valid or not. `pixels` must be compressed."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return PNG_START + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def zeros(count: int) -> bytes:
    """`count` zeros, compressed with zlib."""
    compressor = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [compressor.compress(block[: min(len(block), count - start)]) for start in range(0, count, len(block))]
    return b"".join(parts) + compressor.flush()


def resized(content: bytes, marker: bytes, offset: int, form: str, side: int) -> bytes:
    """Replace the width and height in a file's header, which are `offset` bytes after a marker."""
    at = content.index(marker) + offset
    sides = struct.pack(form, side, side)
    return content[:at] + sides + content[at + len(sides) :]


def bombs(plain: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Decompression bombs: small files that decode to huge pictures."""
    yield "real-bomb.png", png(9400, 9400, zeros(9401 * 9400))
    yield "bomb.png", png(60_000, 60_000, zeros(1 << 24))
    yield "within-the-pixels.png", png(5_900, 5_900, zeros(5_901 * 5_900))
    yield "bomb.jpg", resized(plain["JPEG"], b"\xff\xc0", 5, ">HH", 65_500)
    yield "bomb.gif", resized(plain["GIF"], b"GIF8", 6, "<HH", 65_535)
    yield "bomb.bmp", resized(plain["BMP"], b"BM", 18, "<ii", 40_000)
    yield "bomb.avif", resized(plain["AVIF"], b"ispe", 8, ">II", 50_000)
    yield "bomb.heic", resized(plain["HEIF"], b"ispe", 8, ">II", 50_000)
    yield "real-bomb.webp", encode(Image.new("RGB", (7_000, 7_000)), "WEBP", method=0, quality=1)
    yield "real-bomb.gif", encode(Image.new("P", (7_000, 7_000)), "GIF")
    yield "real-bomb.jpg", encode(Image.new("L", (9_000, 9_000)), "JPEG", quality=1)


def odd_shapes() -> Iterator[tuple[str, bytes]]:
    """Pictures of extreme proportions or without pixels."""
    yield "line.png", png(65_535, 1, zeros(65_536))
    yield "column.png", png(1, 65_535, zeros(2 * 65_535))
    yield "long.png", png(19_999, 16, zeros(20_000 * 16))
    for width, height in ((0, 0), (0, 50), (50, 0)):
        yield f"zero-{width}-{height}.png", png(width, height, zeros(60))
        yield f"zero-{width}-{height}.gif", b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0;"
        yield f"zero-{width}-{height}.bmp", b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, width, height, 1, 24, 0)
    yield "negative.bmp", b"BM" + struct.pack("<IIIIiiHHI", 0, 0, 54, 40, -9, -9, 1, 24, 0) + bytes(300)


def disguises(plain: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Files whose format is not that of their name, and files that are valid in two formats."""
    yield "jpeg-inside.png", plain["JPEG"]
    yield "svg.png", SVG
    yield "html.jpg", b"<!doctype html><script>alert(1)</script>"
    yield "comments.svg", 10_000 * b"<!---->"  # which regular expressions can split in exponentially many ways
    yield "postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n"
    yield "document.jpg", encode(noise(SIDE, SIDE), "PDF")
    yield "float-tiff.png", encode(Image.fromarray(np.full((SIDE, SIDE), 0.5, np.float32)), "TIFF")
    yield "archive-behind.png", plain["PNG"] + b"PK\x03\x04" + bytes(100) + b"PK\x05\x06" + bytes(18)
    yield "script-behind.gif", plain["GIF"] + b"/*;*/=1;alert(1)"
    yield "page-in-comment.jpg", plain["JPEG"][:2] + b"\xff\xfe\x00\x1d<?php system($_GET[0]); ?>" + plain["JPEG"][2:]
    yield "document-before.jpg", b"%PDF-1.4\n" + plain["JPEG"]
    yield "empty.png", b""
    yield "one-byte.png", b"\x89"
    yield "noise.jpg", random.Random(0).randbytes(100_000)
    for name, content in plain.items():
        yield f"start-only.{name.lower()}", content[:16] + bytes(5_000)


def metadata(plain: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Intact pixels with hostile metadata."""
    jpeg, whole = plain["JPEG"], plain["PNG"]
    head, rest = whole[:33], whole[33:]  # the header chunk ends there
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0" + bytes(65_527)
    yield "giant-metadata.jpg", jpeg[:2] + 100 * segment + jpeg[2:]
    yield "empty-segments.jpg", jpeg[:2] + 2_400_000 * b"\xff\xfe\0\x02" + jpeg[2:]
    yield "empty-chunks.png", head + 800_000 * chunk(b"IDAT", b"") + rest
    yield "text-bomb.png", head + chunk(b"zTXt", b"a\0\0" + zeros(1 << 28)) + rest
    yield "many-texts.png", head + 20_000 * chunk(b"tEXt", b"key\0value") + rest
    yield "profile-bomb.png", head + chunk(b"iCCP", b"a\0\0" + zeros(1 << 28)) + rest
    yield "broken-profile.jpg", encode(noise(SIDE, SIDE), "JPEG", icc_profile=random.Random(1).randbytes(3_000))
    yield "broken-profile.webp", encode(noise(SIDE, SIDE), "WEBP", icc_profile=b"\0" * 200)
    # An EXIF directory (TIFF 6.0, section 2) of one entry. The next directory is the same one.
    for name, kind, value in (("short", 3, 6), ("zero", 3, 0), ("nine", 3, 9), ("large", 3, 65_535), ("text", 2, 8)):
        entry = struct.pack("<HHHIHH", 1, 0x0112, kind, 1, value, 0)
        yield f"orientation-{name}-loop.jpg", with_exif(jpeg, b"II*\0\x08\0\0\0" + entry + struct.pack("<I", 8))
    loop = struct.pack("<HHHII", 1, 0x8769, 4, 1, 8)  # a pointer from the directory to itself
    yield "exif-in-itself.jpg", with_exif(jpeg, b"II*\0\x08\0\0\0" + loop + bytes(4))
    far = struct.pack("<HHHII", 1, 0x0112, 3, 0xFFFF_FFFF, 0xFFFF_FFF0)
    yield "exif-far-away.jpg", with_exif(jpeg, b"II*\0\x08\0\0\0" + far + bytes(4))


def with_exif(jpeg: bytes, exif: bytes) -> bytes:
    """A JPEG with this EXIF segment."""
    content = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


def animations() -> Iterator[tuple[str, bytes]]:
    """Animations of ten thousand small frames, which repeat two, and of eight large ones."""
    count = 10_000
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    gif, webp = (encode(red, name, save_all=True, append_images=[blue], duration=10) for name in ("GIF", "WEBP"))
    start = gif.index(b"\x21\xf9")  # of the first frame (GIF89a, section 23)
    yield "frames.gif", gif[:start] + count // 2 * gif[start:-1] + gif[-1:]
    start = webp.index(b"ANMF")
    frames = webp[8:start] + count // 2 * webp[start:]
    yield "frames.webp", b"RIFF" + struct.pack("<I", len(frames)) + frames
    yield "frames.png", animated_png(count, [16 * (b"\0" + 16 * colour) for colour in (b"\xff\0\0", b"\0\0\xff")])
    large = [Image.new("L", (3_000, 3_000), 30 * number) for number in range(8)]
    yield "large-frames.gif", encode(large[0], "GIF", save_all=True, append_images=large[1:])


def animated_png(count: int, rows: list[bytes]) -> bytes:
    """An animation of `count` frames of 16 × 16 pixels, which repeats these (PNG, third edition, section 11.3.6)."""

    def control(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 16, 16, 0, 0, 1, 1000, 0, 0))

    pixels = [zlib.compress(frame) for frame in rows]
    still = png(16, 16, pixels[0], colour=2, extra=chunk(b"acTL", struct.pack(">II", count, 0)) + control(0))
    end = still.index(b"IEND") - 4  # of the pixels
    parts = [still[:end]]
    for frame in range(1, count):
        number = 2 * frame - 1  # controls and pixels are numbered together
        content = struct.pack(">I", number + 1) + pixels[frame % len(pixels)]
        parts += control(number), chunk(b"fdAT", content)
    return b"".join(parts) + still[end:]


def colours(plain: bytes) -> Iterator[tuple[str, bytes]]:
    """Unusual and invalid colour formats."""
    ramp = np.linspace(0, 65_535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    yield "16-bit.png", encode(Image.fromarray(ramp), "PNG")
    yield "cmyk.jpg", encode(noise(SIDE, SIDE).convert("CMYK"), "JPEG")
    yield "palette-missing.png", png(SIDE, SIDE, zeros((SIDE + 1) * SIDE), colour=3)
    yield "colour-type-9.png", png(SIDE, SIDE, zeros((SIDE + 1) * SIDE), colour=9)
    yield "depth-7.png", png(SIDE, SIDE, zeros((SIDE + 1) * SIDE), depth=7)
    yield "wrong-checksum.png", plain[:-20] + bytes(4) + plain[-16:]
    yield "pixels-of-nothing.png", png(SIDE, SIDE)
    yield "more-pixels.png", png(SIDE, SIDE, zeros(1 << 24))


def main() -> None:
    """Write all files into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in hostile_files():
        (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
