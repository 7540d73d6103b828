"""Plain borders around a picture, which are cropped before it is classified."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAME_GRID = 160  # points along each side, at which a frame is looked for
FRAME_COLOUR = 16  # of 255 steps that a point of a bar may differ from the bar's colour, by JPEG
FRAME_PLAIN = 0.02  # share of a bar's line that may differ by more
FRAME_EDGE = 0.5  # share of a line that a picture's own edge sets apart from the bar; writing covers less
FRAME_LEAST = 0.03  # share of the width or height that a frame takes away at least
STATUS_BAR = 0.06  # share of the height that a telephone writes on, above and below a picture on its screen
STATUS_INK = 0.3  # share of such a line that it writes on at most
STATUS_GAP = 0.08  # share of the height between that and the picture at least; under a caption there is less
MIN_CONTENT_SIDE = 16  # pixels


def content_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """Where the picture itself lies in a framed one, as left, top, right and bottom in pixels; None without a frame.

    A frame is a bar of one colour that ends at a straight edge: black bars around a film still, a white border. Where
    writing stands on the bar, it stays, but for a telephone's screen, which is upright, has a bar above and below the
    picture, and signs at its very top and bottom.
    """
    lines = np.asarray(picture.resize((FRAME_GRID, FRAME_GRID), Image.Resampling.NEAREST)).astype(np.int16)
    top, bottom = _bars(lines, STATUS_BAR) if picture.height > picture.width else (0, 0)
    if not (top and bottom):
        top, bottom = _bars(lines)
    left, right = _bars(lines[top : FRAME_GRID - bottom].transpose(1, 0, 2))
    if not (left or top or right or bottom):
        return None
    x, y = picture.width / FRAME_GRID, picture.height / FRAME_GRID
    box = (round(left * x), round(top * y), picture.width - round(right * x), picture.height - round(bottom * y))
    return box if min(box[2] - box[0], box[3] - box[1]) >= MIN_CONTENT_SIDE else None


def _bars(lines: NDArray[np.int16], written: float = 0) -> tuple[int, int]:
    """How many of a picture's lines, of shape (lines, points, 3), are a bar at its start and at its end.

    There may be writing on that share of the lines, at the very start and the very end.
    """
    first, last = _bar(lines, written), _bar(lines[::-1], written)
    return (first, last) if FRAME_LEAST * len(lines) <= first + last < len(lines) else (0, 0)


def _bar(lines: NDArray[np.int16], written: float) -> int:
    """How many of these lines, of shape (lines, points, 3), are a bar before a picture's edge."""
    lines = lines[:, ::2]  # half of the points see as much
    for inked in (round(written * len(lines)), 0) if written else (0,):
        colour = _colour(lines[inked])
        if _unlike(lines[inked], colour) > FRAME_PLAIN:
            continue  # the usual case; all lines would take ten times as long
        unlike = _unlike(lines, colour)
        end = inked + int((unlike[inked:] > FRAME_PLAIN).argmax())
        if end - inked < (STATUS_GAP * len(lines) if inked else 1) or (unlike[:inked] > STATUS_INK).any():
            continue
        if _unlike(lines[end : end + 4], _colour(lines[end - 1])).max() >= FRAME_EDGE:  # else the colour runs on
            return end
    return 0


def _colour(line: NDArray[np.int16]) -> NDArray[np.int16]:
    colour: NDArray[np.int16] = line.mean(0).astype(np.int16)
    return colour


def _unlike(points: NDArray[np.int16], colour: NDArray[np.int16]) -> NDArray[np.float64]:
    """The share of points in each line that have another colour; points of shape (..., points, 3)."""
    red, green, blue = np.moveaxis(np.abs(points - colour) > FRAME_COLOUR, -1, 0)
    shares: NDArray[np.float64] = (red | green | blue).mean(-1)  # any(-1) takes three times as long
    return shares
