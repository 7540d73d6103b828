"""Detection of plain borders, which are cropped before a picture is classified."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID_SIDE = 160  # points along each side at which the picture is sampled
COLOUR_TOLERANCE = 16  # of 255 levels; JPEG changes a plain colour by up to this much
MAX_OUTLIERS = 0.02  # share of a border line that may differ by more
MIN_EDGE = 0.5  # share of the first line of the content that differs from the border; text covers less of a line
MIN_BORDER = 0.03  # share of the width or height that the borders of two opposite sides cover together
STATUS_BAR = 0.06  # share of the height that the status bar of a phone takes, and its buttons at the bottom
MAX_STATUS_INK = 0.3  # share of a line of the status bar that its icons cover
MIN_STATUS_GAP = 0.08  # share of the height between status bar and content; a caption leaves less
MAX_CAPTION = 0.3  # share of the height, from the top of a caption, within which the background comes back
MIN_BACKGROUND = 0.5  # share of such a line that the background covers
MIN_LETTER_RUNS = 3  # runs of letters in a line of a caption, or of words where letters touch
CAPTION_MARGIN = 3  # points on the left and on the right of a caption, most of them background
MIN_CONTENT_SIDE = 16  # pixels


def content_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """Find the content of a picture inside its plain border.

    A border is a margin of one colour that ends at a straight edge, like the black bars of a letterboxed film still
    or a white frame. A margin with text on it is content, and so is a background that goes on behind a caption, like
    the sky above it. The exception is a phone screenshot: upright, with a border above and below the content, a status
    bar at the very top and buttons at the very bottom.

    Args:
        picture: upright RGB.

    Returns:
        Left, top, right and bottom of the content in pixels; None for a picture without a border.
    """
    lines = np.asarray(picture.resize((GRID_SIDE, GRID_SIDE), Image.Resampling.NEAREST)).astype(np.int16)
    top, bottom = _border_sizes(lines, STATUS_BAR) if picture.height > picture.width else (0, 0)
    if not (top and bottom):
        top, bottom = _border_sizes(lines)
    left, right = _border_sizes(lines[top : GRID_SIDE - bottom].transpose(1, 0, 2))
    inside = lines[:, left : GRID_SIDE - right]
    kept = (0 if _is_background(inside, top) else top, 0 if _is_background(inside[::-1], bottom) else bottom)
    if kept != (top, bottom):
        top, bottom = kept if sum(kept) >= MIN_BORDER * GRID_SIDE else (0, 0)
        left, right = _border_sizes(lines[top : GRID_SIDE - bottom].transpose(1, 0, 2))
    if not (left or top or right or bottom):
        return None
    x, y = picture.width / GRID_SIDE, picture.height / GRID_SIDE
    box = (round(left * x), round(top * y), picture.width - round(right * x), picture.height - round(bottom * y))
    return box if min(box[2] - box[0], box[3] - box[1]) >= MIN_CONTENT_SIDE else None


def _border_sizes(lines: NDArray[np.int16], status_bar: float = 0) -> tuple[int, int]:
    """Count the border lines at the start and at the end of a picture.

    Args:
        lines: shape (lines, points, 3).
        status_bar: share of the lines at either end that a status bar may take.
    """
    first, last = _border_size(lines, status_bar), _border_size(lines[::-1], status_bar)
    return (first, last) if MIN_BORDER * len(lines) <= first + last < len(lines) else (0, 0)


def _border_size(lines: NDArray[np.int16], status_bar: float) -> int:
    """Count the border lines at the start of these lines, of shape (lines, points, 3)."""
    lines = lines[:, ::2]  # every second point is enough
    for skipped in (round(status_bar * len(lines)), 0) if status_bar else (0,):
        colour = _mean_colour(lines[skipped])
        if _outliers(lines[skipped], colour) > MAX_OUTLIERS:
            continue  # the usual case; testing all lines would take ten times as long
        outliers = _outliers(lines, colour)
        end = skipped + int((outliers[skipped:] > MAX_OUTLIERS).argmax())
        if (
            end - skipped < (MIN_STATUS_GAP * len(lines) if skipped else 1)
            or (outliers[:skipped] > MAX_STATUS_INK).any()
        ):
            continue
        if _outliers(lines[end : end + 4], _mean_colour(lines[end - 1])).max() >= MIN_EDGE:  # else the colour goes on
            return end
    return 0


def _is_background(lines: NDArray[np.int16], end: int) -> bool:
    """Whether the plain lines before `end` are the background of a caption, visible between and below its letters.

    The background may be a gradient: it is followed from line to line by the points where it is visible.

    Args:
        lines: shape (lines, points, 3), without borders at the ends of the lines.
        end: number of plain lines.
    """
    if not end:
        return False
    background = lines[max(0, end - 4) : end].mean(0)  # (points, 3)
    edge = end + int(_outliers(lines[end : end + 4], background).argmax())
    is_caption = False
    for line in lines[edge : edge + round(MAX_CAPTION * len(lines))]:
        visible = (np.abs(line - background) <= COLOUR_TOLERANCE).all(-1)
        if min(visible[:CAPTION_MARGIN].mean(), visible[-CAPTION_MARGIN:].mean()) < 0.5:
            return False  # the content of a border reaches its corners
        runs = int(np.count_nonzero(visible[:-1] & ~visible[1:]))
        is_caption = is_caption or runs >= MIN_LETTER_RUNS
        if is_caption and visible.mean() >= MIN_BACKGROUND:
            return True
        background += (line - background)[visible].mean(0)
    return False


def _mean_colour(line: NDArray[np.int16]) -> NDArray[np.int16]:
    colour: NDArray[np.int16] = line.mean(0).astype(np.int16)
    return colour


def _outliers(points: NDArray[np.int16], colour: NDArray[np.int16]) -> NDArray[np.float64]:
    """Share of the points in each line that differ from a colour; points of shape (..., points, 3)."""
    red, green, blue = np.moveaxis(np.abs(points - colour) > COLOUR_TOLERANCE, -1, 0)
    shares: NDArray[np.float64] = (red | green | blue).mean(-1)  # any(-1) takes three times as long
    return shares
