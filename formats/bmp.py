"""Rewrite BMP files whose bit masks Pillow does not know (Microsoft's documentation of BITMAPV5HEADER)."""

import struct

import numpy as np
from numpy.typing import NDArray

BMP_START = b"BM"
HEADERS = struct.Struct("<2sIIIIiiHHI")  # the file header, and the fields of the second header up to the compression
MASKS = struct.Struct("<4I")  # of red, green, blue and alpha
MASKS_AT = 54  # behind a header of 40 bytes, or inside a longer one
LENGTH_WITH_ALPHA = 56  # bytes of the shortest header that has a mask of alpha (version 3)
BIT_MASKS, ALPHA_BIT_MASKS = 3, 6  # values of the field for the compression
BGR, BGRA = (0xFF0000, 0xFF00, 0xFF, 0), (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
READ_BY_PILLOW = {(32, BGR), (32, BGRA), (16, (0xF800, 0x7E0, 0x1F, 0)), (16, (0x7C00, 0x3E0, 0x1F, 0))}


def with_known_masks(data: bytes) -> bytes:
    """Rewrite a BMP of 16 or 32 bits with other masks as one of 32 bits in the order BGRA; return others as they are.

    Raises:
        ValueError: if pixels are missing.
    """
    if len(data) < MASKS_AT + MASKS.size:
        return data
    _, _, _, start, length, width, height, _, bits, compression = HEADERS.unpack_from(data)
    masks = MASKS.unpack_from(data, MASKS_AT)
    if compression == BIT_MASKS and length < LENGTH_WITH_ALPHA:
        masks = (*masks[:3], 0)
    is_masked = bits in (16, 32) and compression in (BIT_MASKS, ALPHA_BIT_MASKS)
    if not is_masked or (compression == BIT_MASKS and (bits, masks) in READ_BY_PILLOW):
        return data
    bytes_per_row = (width * bits + 31) // 32 * 4
    rows = np.frombuffer(data, np.uint8, abs(height) * bytes_per_row, start).reshape(abs(height), bytes_per_row)
    values = np.ascontiguousarray(rows[:, : width * bits // 8]).view(f"<u{bits // 8}")
    red, green, blue, alpha = (_channel(values, mask) for mask in masks)
    body = np.stack((blue, green, red, alpha), -1).tobytes()
    known = MASKS.pack(*(BGRA if masks[3] else BGR))
    start = MASKS_AT + len(known)
    head = HEADERS.pack(BMP_START, start + len(body), 0, start, LENGTH_WITH_ALPHA, width, height, 1, 32, BIT_MASKS)
    return head + struct.pack("<IiiII", len(body), 0, 0, 0, 0) + known + body


def _channel(values: NDArray[np.unsignedinteger], mask: int) -> NDArray[np.uint8]:
    """The samples under a mask, scaled to 8 bits."""
    lowest = (mask & -mask).bit_length() - 1
    shift = max(lowest, mask.bit_length() - 8, 0)
    top = mask >> shift
    samples = (values.astype(np.uint32) & mask) >> shift
    return (samples * 255 // top if top else samples).astype(np.uint8)
