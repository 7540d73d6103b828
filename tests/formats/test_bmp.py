import struct
from typing import Any

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from images import BadImage, open_picture

PIXELS = np.asarray(noise(37, 29))  # rows of 16 bits need padding
# Bits, and the masks of red, green, blue and alpha.
LAYOUTS = {
    "B8G8R8A8": (32, 0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    "R8G8B8A8": (32, 0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    "A8B8G8R8": (32, 0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    "B8G8R8X8": (32, 0xFF0000, 0xFF00, 0xFF, 0),
    "R8G8B8X8": (32, 0xFF, 0xFF00, 0xFF0000, 0),
    "A2R10G10B10": (32, 0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000),
    "R5G6B5": (16, 0xF800, 0x7E0, 0x1F, 0),
    "B5G6R5": (16, 0x1F, 0x7E0, 0xF800, 0),
    "X1R5G5B5": (16, 0x7C00, 0x3E0, 0x1F, 0),
    "A1R5G5B5": (16, 0x7C00, 0x3E0, 0x1F, 0x8000),
    "A4R4G4B4": (16, 0xF00, 0xF0, 0xF, 0xF000),
    "R4G4B4A4": (16, 0xF000, 0xF00, 0xF0, 0xF),
    "X4R4G4B4": (16, 0xF00, 0xF0, 0xF, 0),
}
WITH_ALPHA = [name for name, layout in LAYOUTS.items() if layout[-1]]


def bmp(layout: str, header: int, alpha: np.ndarray[Any, Any] | int = 255, *, upside: bool = True) -> bytes:
    """The pixels as a BMP with bit masks and a second header of this length: 40, 52, 56 (v3), 108 (v4) or 124 (v5)."""
    bits, *masks = LAYOUTS[layout]
    height, width, _ = PIXELS.shape
    channels = np.dstack((PIXELS, np.broadcast_to(alpha, (height, width)))).astype(np.uint64)
    values = np.zeros((height, width), np.uint64)
    for number, mask in enumerate(masks):
        unit = mask & -mask
        values += (channels[..., number] * (mask // unit) + 127) // 255 * unit if mask else 0
    rows = values[:: -1 if upside else 1].astype(f"<u{bits // 8}").view(np.uint8).reshape(height, -1)
    body = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()
    info = struct.pack("<IiiHHIIiiII", header, width, height if upside else -height, 1, bits, 3, len(body), 0, 0, 0, 0)
    packed_masks = struct.pack("<4I", *masks)
    info += packed_masks[:12] if header < 56 else (packed_masks + b"BGRs" + bytes(64))[: header - 40]
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(body), 0, 0, 14 + len(info)) + info + body


def is_close(opened: np.ndarray[Any, Any], layout: str) -> bool:
    """Whether pixels differ by rounding only: by half a step of the channel with the fewest bits."""
    fewest = min(mask.bit_count() for mask in LAYOUTS[layout][1:4])
    rows = PIXELS[-len(opened) :].astype(int)
    return bool((abs(opened.astype(int) - rows) <= 0.5 * 255 / (2**fewest - 1) + 1).all())


@pytest.mark.parametrize("header", [40, 52, 56, 108, 124])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_pixels(layout: str, header: int) -> None:
    for upside in (True, False):
        assert is_close(np.asarray(open_picture(bmp(layout, header, upside=upside))), layout)


@pytest.mark.parametrize("header", [56, 108, 124])
@pytest.mark.parametrize("layout", WITH_ALPHA)
def test_alpha_that_is_0_everywhere_is_not_meant(layout: str, header: int) -> None:
    assert is_close(np.asarray(open_picture(bmp(layout, header, alpha=0))), layout)


@pytest.mark.parametrize("header", [56, 108, 124])
@pytest.mark.parametrize("layout", WITH_ALPHA)
def test_alpha_that_hides_a_part_counts(layout: str, header: int) -> None:
    alpha = np.full(PIXELS.shape[:2], 255)
    alpha[:10] = 0
    opened = np.asarray(open_picture(bmp(layout, header, alpha)))
    assert (opened[:10] == 255).all()
    assert is_close(opened[10:], layout)


@pytest.mark.parametrize("layout", ["B8G8R8A8", "A4R4G4B4"])
def test_a_bmp_that_lacks_rows_is_refused(layout: str) -> None:
    whole = bmp(layout, 108)
    for length in (60, 200, len(whole) - 200):
        with pytest.raises(BadImage, match="damaged or incomplete"):
            open_picture(whole[:length])


@pytest.mark.parametrize("layout", ["A4R4G4B4", "B8G8R8A8"])
def test_a_bmp_of_alpha_bit_masks(layout: str) -> None:
    """Windows CE has a fourth mask behind a header of 40 bytes, and another value for the compression."""
    alpha = np.full(PIXELS.shape[:2], 255)
    alpha[:10] = 0
    data = bmp(layout, 56, alpha)
    data = data[:14] + struct.pack("<I", 40) + data[18:30] + struct.pack("<I", 6) + data[34:]
    opened = np.asarray(open_picture(data))
    assert (opened[:10] == 255).all()
    assert is_close(opened[10:], layout)


def test_a_mask_of_no_bits_is_a_channel_of_zeros() -> None:
    data = bytearray(bmp("X4R4G4B4", 56))
    data[54:58] = bytes(4)
    opened = np.asarray(open_picture(bytes(data)))
    assert not opened[..., 0].any()
    assert opened[..., 1:].any()


def test_a_bmp_without_masks_has_no_alpha() -> None:
    picture = Image.fromarray(PIXELS)
    body = np.dstack((PIXELS[::-1, :, ::-1], np.zeros(PIXELS.shape[:2], np.uint8))).tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, 37, 29, 1, 32, 0, len(body), 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + info + body
    assert open_picture(data).tobytes() == picture.tobytes()
