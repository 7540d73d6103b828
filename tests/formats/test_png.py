import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from pictures import encode, noise, png_chunk, png_chunks, png_file
from PIL import Image

from images import BadImage, open_picture

PICTURE = noise(64, 48)
METADATA = {
    b"iCCP": b"monitor\0\0" + zlib.compress(b"profile"),
    b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
    b"tEXt": b"Comment\0Hello",
    b"zTXt": b"Comment\0\0" + zlib.compress(b"Hello"),
    b"iTXt": b"Comment\0\1\0\0\0" + zlib.compress(b"Hello"),
    b"eXIf": b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0",  # turned by 90 degrees
    b"tIME": bytes(7),
    b"sRGB": b"\0",
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": bytes(32),
    b"sBIT": b"\5\5\5",
    b"bKGD": b"\0\0\0\0\0\0",
    b"cICP": b"\1\x0d\0\1",
    b"prVt": b"a private chunk",
}


def interlaced(picture: Image.Image) -> bytes:
    """An RGB PNG in seven passes (section 8.2), which Pillow cannot write."""
    pixels = np.asarray(picture)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = (row for x, y, dx, dy in passes for row in pixels[y::dy, x::dx])
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", *picture.size, 8, 2, 0, 0, 1)
    return png_file(png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(raw)), png_chunk(b"IEND", b""))


def packed(samples: np.ndarray[Any, Any], depth: int, colour: int, transparent: bytes, extra: bytes = b"") -> bytes:
    """A PNG of samples of shape (height, width) or (height, width, 3), with a tRNS chunk."""
    height, width = samples.shape[:2]
    bits = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(height, -1, 2), axis=2)[..., 16 - depth :]
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return png_file(
        png_chunk(b"IHDR", header),
        extra,
        png_chunk(b"tRNS", transparent),
        png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))),
        png_chunk(b"IEND", b""),
    )


PLAIN = {
    "RGB": encode(PICTURE),
    "RGBA": encode(PICTURE.convert("RGBA")),
    "grey": encode(PICTURE.convert("L")),
    "palette": encode(PICTURE.quantize(16)),
    "16-bit": encode(Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) << 8)),
    "interlaced": interlaced(PICTURE),
    "animated": encode(PICTURE, save_all=True, append_images=[noise(64, 48, 1)]),
    "hidden still": encode(
        noise(64, 48, 2), save_all=True, append_images=[PICTURE, noise(64, 48, 1)], default_image=True
    ),
}


def with_metadata(data: bytes, before: Iterable[bytes] = (), behind: Iterable[bytes] = ()) -> bytes:
    """The PNG with more chunks before or behind its pixels."""
    first, *chunks, last = (png_chunk(*chunk) for chunk in png_chunks(data))
    return png_file(first, *before, *chunks, *behind, last)


def same_pixels(one: bytes, other: bytes) -> bool:
    return open_picture(one).tobytes() == open_picture(other).tobytes()


@pytest.mark.parametrize("kind", METADATA)
def test_a_wrong_checksum_of_metadata_does_not_matter(kind: bytes) -> None:
    broken = [png_chunk(kind, METADATA[kind], broken=True)]
    assert same_pixels(with_metadata(PLAIN["RGB"], broken), PLAIN["RGB"])
    assert same_pixels(with_metadata(PLAIN["RGB"], behind=broken), PLAIN["RGB"])


@pytest.mark.parametrize("name", PLAIN)
def test_nor_do_many_in_any_png(name: str) -> None:
    broken = [png_chunk(kind, content, broken=True) for kind, content in METADATA.items()]
    assert same_pixels(with_metadata(PLAIN[name], broken, broken), PLAIN[name])


def test_metadata_that_says_nothing_sensible_does_not_matter() -> None:
    for kind in METADATA:
        assert same_pixels(with_metadata(PLAIN["RGB"], [png_chunk(kind, b"\1")]), PLAIN["RGB"])


def test_orientation_counts_with_a_right_checksum() -> None:
    turned = with_metadata(PLAIN["RGB"], [png_chunk(b"eXIf", METADATA[b"eXIf"])])
    assert open_picture(turned).size == (48, 64)


@pytest.mark.parametrize("damage", ["checksum", "content"])
@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT"])
def test_a_damaged_critical_chunk_is_refused(kind: bytes, damage: str) -> None:
    parts = []
    for name, content in png_chunks(PLAIN["palette"]):
        chunk = bytearray(png_chunk(name, content, broken=name == kind and damage == "checksum"))
        if name == kind and damage == "content":
            chunk[8 + len(content) // 2] ^= 1
        parts.append(bytes(chunk))
    with pytest.raises(BadImage, match="damaged or incomplete"):
        open_picture(png_file(*parts))


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_metadata_is_never_unpacked(kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses what unpacks to more than 1 MB, such as the profile of a calibrated monitor."""

    def unpack(*_: Any) -> None:
        raise AssertionError("unpacked")

    start = {b"iCCP": b"monitor\0\0", b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0"}[kind]
    large = np.random.default_rng(0).bytes(1_200_000)
    monkeypatch.setattr(zlib, "decompressobj", unpack)
    for content in (large, bytes(20_000_000)):
        chunks = [png_chunk(kind, start + zlib.compress(content))] * 3
        assert same_pixels(with_metadata(PLAIN["RGB"], chunks, chunks), PLAIN["RGB"])


def test_a_png_without_its_end_opens_if_all_pixels_are_there() -> None:
    data = PLAIN["RGB"]
    assert same_pixels(data[:-12], data)  # no IEND
    assert same_pixels(data[:-14], data)  # nor all of the checksum of IDAT
    assert same_pixels(with_metadata(data, behind=[png_chunk(b"tEXt", bytes(500))])[:-100], data)
    with pytest.raises(BadImage, match="damaged or incomplete"):
        open_picture(data[:-200])


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_that_stands_for_transparent(depth: int) -> None:
    top = 2**depth - 1
    samples = np.arange(40 * 60).reshape(40, 60) * top // 2400
    key = top // 3 or 1
    samples[samples == key] = (key + 1) & top
    samples[:8] = key
    opened = np.asarray(open_picture(packed(samples, depth, 0, struct.pack(">H", key))))
    assert (opened[:8] == 255).all()
    expected = samples[8:, :, None] >> 8 if depth == 16 else samples[8:, :, None] * 255 // top
    assert (opened[8:] == expected).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_colour_that_stands_for_transparent(depth: int) -> None:
    samples = np.random.default_rng(0).integers(0, 200, (40, 60, 3)) << (depth - 8)
    samples[:8] = np.array([250, 3, 220]) << (depth - 8)
    opened = np.asarray(open_picture(packed(samples, depth, 2, struct.pack(">3H", *samples[0, 0]))))
    assert (opened[:8] == 255).all()
    assert (opened[8:] == samples[8:] >> (depth - 8)).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palette_entries_that_are_transparent(depth: int) -> None:
    samples = np.ones((40, 60), np.int64)
    samples[:8] = 0
    palette = png_chunk(b"PLTE", b"\xff\0\0" + b"\0\x80\0" * (2**depth - 1))
    opened = np.asarray(open_picture(packed(samples, depth, 3, b"\0\x80", palette)))
    assert (opened[:8] == 255).all()  # the red is not seen
    assert (abs(opened[8:].astype(int) - [127, 191, 127]) <= 1).all()  # half of the green


def frame(number: int, box: tuple[int, int, int, int], pixels: np.ndarray[Any, Any], blend: int = 0) -> bytes:
    """A frame of an APNG whose data comes in two chunks; `number` is the first of its three sequence numbers."""
    x, y, width, height = box
    control = struct.pack(">IIIIIHHBB", number, width, height, x, y, 1, 10, 0, blend)
    packed_pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    parts = (packed_pixels[:20], packed_pixels[20:])
    data = [png_chunk(b"fdAT", struct.pack(">I", number + 1 + i) + part) for i, part in enumerate(parts)]
    return png_chunk(b"fcTL", control) + b"".join(data)


def hidden_still(*frames: bytes, depth: int = 8) -> bytes:
    """An APNG of RGBA pixels whose still image, red all over, is no part of the animation."""
    header = struct.pack(">IIBBBBB", 64, 48, depth, 6, 0, 0, 0)
    red = (b"\0" + (b"\xff\0\0\xff" if depth == 8 else b"\xff\xff\0\0\0\0\xff\xff") * 64) * 48
    return png_file(
        png_chunk(b"IHDR", header),
        png_chunk(b"acTL", struct.pack(">II", len(frames), 0)),
        png_chunk(b"IDAT", zlib.compress(red)),
        *frames,
        png_chunk(b"IEND", b""),
    )


RGBA = np.asarray(PICTURE.convert("RGBA"))
WHOLE = (0, 0, 64, 48)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_still_image_outside_the_animation_is_not_shown(count: int) -> None:
    opened = open_picture(hidden_still(*(frame(3 * number, WHOLE, RGBA) for number in range(count))))
    assert opened.tobytes() == PICTURE.tobytes()
    assert opened.info["animated"] == (count > 1)


@pytest.mark.parametrize("blend", [0, 1])
def test_nor_is_it_seen_beside_or_through_a_frame(blend: int) -> None:
    pixels = RGBA[:20, :30].copy()
    pixels[:10, :, 3] = 0
    opened = np.asarray(open_picture(hidden_still(frame(0, (7, 5, 30, 20), pixels, blend))))
    expected = np.full((48, 64, 3), 255)
    expected[15:25, 7:37] = RGBA[10:20, :30, :3]
    assert (opened == expected).all()


def test_nor_in_an_animation_of_16_bits() -> None:
    pixels = RGBA.astype(">u2") * 257
    assert open_picture(hidden_still(frame(0, WHOLE, pixels), depth=16)).tobytes() == PICTURE.tobytes()


def test_later_frames_are_still_found() -> None:
    empty = np.zeros_like(RGBA)
    opened = open_picture(hidden_still(frame(0, WHOLE, empty), frame(3, WHOLE, empty), frame(6, WHOLE, RGBA)))
    assert opened.info["frame"] == 2
    assert opened.tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("damaged", [b"acTL", b"fcTL", b"fdAT"])
def test_a_damaged_animation_ends_where_it_is_damaged(damaged: bytes) -> None:
    for name, expected in (("animated", PICTURE), ("hidden still", noise(64, 48, 2))):
        for which in (0, -1):
            chunks = png_chunks(PLAIN[name])
            at = [number for number, (kind, _) in enumerate(chunks) if kind == damaged][which]
            parts = [png_chunk(*chunk, broken=number == at) for number, chunk in enumerate(chunks)]
            whole = which == -1 and damaged != b"acTL"  # then the first frame is whole
            opened = open_picture(png_file(*parts))
            assert opened.tobytes() == (PICTURE if whole else expected).tobytes()
