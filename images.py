"""Opening pictures that strangers send: the one way in for page, command line, training and evaluation."""

import math
import os
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pillow_heif import register_heif_opener

from borders import content_box

# Pillow would open over forty formats by their first bytes; nearly all of its security
# advisories live in the ones left out here. "JPEG" also admits the MPO files of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
JPEG = ("JPEG", "MPO")  # what Pillow calls them once they are open
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, AVIF or HEIC"
SUFFIXES = ("jpg", "jpeg", "jfif", "mpo", "png", "webp", "gif", "bmp", "avif", "heic", "heif")

MAX_MEGABYTES = 10
MAX_JPEG_PIXELS = 64_000_000  # 50-megapixel phones pass: JPEGs are decoded at a fraction of their size
MAX_PIXELS = 36_000_000
MEGAPIXELS = f"the limit is {MAX_PIXELS // 1_000_000} megapixels, for JPEG {MAX_JPEG_PIXELS // 1_000_000}"
MAX_SIDE = 20_000  # pixels
MIN_SIDE = 16  # pixels
MAX_JPEG_SCANS = 100  # cameras write 1, progressive files about 10; each costs a pass over all pixels
JPEG_DRAFT_SIDE = 1000  # pixels of the longest side; a quarter of a 12-megapixel photo's
JPEG_DRAFT_SHORT_SIDE = 320  # pixels; twice the network's input
SHOWN_SIDE = 1460  # pixels; Streamlit encodes anything wider a second time
SHORT_SIDE = 160  # pixels that the other side keeps; the network's input
WHOLE_SIDE = 4700  # pixels; a 16-megapixel photo's
ORIENTATION = 0x0112  # EXIF 2.32
START_OF_SCAN = (0xFF, 0xDA)  # ITU T.81, table B.1; never inside a scan's own data

register_heif_opener()
# Both are process-wide and set once: per-call `warnings.catch_warnings` is not thread-safe.
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # so Pillow itself refuses what is larger still
warnings.simplefilter("error", Image.DecompressionBombWarning)


class BadImage(ValueError):
    """A picture that cannot be used; its text is one sentence for the person who sent it."""


def open_picture(source: bytes | str | os.PathLike[str], *, whole: bool = False) -> Image.Image:
    """Turn untrusted bytes, or the file at a path, into an upright RGB picture.

    The first frame stands for an animation (then `info["animated"]` is true), transparency
    is laid over white, and the longest side is at most `SHOWN_SIDE` pixels, or the
    other `SHORT_SIDE`.

    Args:
        source: the encoded picture, or where it lies.
        whole: at its own size instead, up to `WHOLE_SIDE`: to be kept, not to be judged.

    Returns:
        A loaded picture in mode RGB, without metadata.

    Raises:
        BadImage: for whatever is not a readable picture within the limits.
    """
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    if not data:
        raise BadImage("This file is empty.")
    if len(data) > MAX_MEGABYTES * 1_000_000:
        raise BadImage(_too_many_bytes(len(data)))
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image)
            if image.format in JPEG and _scans(data) > MAX_JPEG_SCANS:
                raise BadImage("This JPEG has more scans than any camera or program writes.")
            return _decode(image, whole)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"This file is not a picture in a format we read: {FORMAT_NAMES}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage(f"This picture is too large to open safely; {MEGAPIXELS}.") from error
    except Exception as error:  # decoders fed with hostile bytes raise nearly anything
        raise BadImage("This picture is damaged or incomplete and cannot be opened.") from error


def to_square(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """All of a picture that is `content_box`, on a square of `side` pixels, of shape (side, side, 3).

    Memes carry their captions at the edges, which a centre crop cuts off; letterboxing would keep the
    proportions, but spends a third of the square on padding for a 3:2 photo and looks like the white
    bar above a captioned picture.
    """
    box = content_box(picture)
    return resize_to_square(picture.crop(box) if box else picture, side)


def resize_to_square(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """The same of what is no longer to be searched for a frame."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0))


def find_pictures(folder: Path) -> list[Path]:
    """Every file below a folder whose name ends like a picture's, sorted by path.

    Whatever cannot be looked at is among them, folders too, so that opening it says why.
    """
    closed = list[OSError]()
    files = [Path(where, name) for where, _, names in os.walk(folder, onerror=closed.append) for name in names]
    pictures = [path for path in files if path.suffix[1:].lower() in SUFFIXES]
    return sorted(pictures + [Path(e.filename) for e in closed if not isinstance(e, FileNotFoundError)])


def _read_file(path: Path) -> bytes:
    try:
        if not path.exists():
            raise BadImage("There is no such file.")
        if path.is_dir():
            raise BadImage("This folder cannot be read.")
        if not path.is_file():  # a pipe or device would never end
            raise BadImage("This is not a file.")
        if (size := path.stat().st_size) > MAX_MEGABYTES * 1_000_000:
            raise BadImage(_too_many_bytes(size))
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"This file cannot be read: {error.strerror or 'unknown reason'}.") from error


def _too_many_bytes(size: int) -> str:
    return f"This file has {size / 1_000_000:.1f} MB; the limit is {MAX_MEGABYTES} MB."


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS and image.format not in JPEG:
        raise BadImage(f"This picture has {width} × {height} pixels; {MEGAPIXELS}.")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"This picture has {width} × {height} pixels; no side may exceed {MAX_SIDE}.")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"This picture has {width} × {height} pixels; each side needs at least {MIN_SIDE}.")


def _scans(data: bytes) -> int:
    """How many scans a JPEG has at most."""
    code = np.frombuffer(data, np.uint8)  # bytes.count takes four times as long, 5 % of opening a photo
    return int(np.count_nonzero((code[:-1] == START_OF_SCAN[0]) & (code[1:] == START_OF_SCAN[1])))


def _decode(image: Image.Image, whole: bool) -> Image.Image:
    draft_side, most = (WHOLE_SIDE, WHOLE_SIDE) if whole else (JPEG_DRAFT_SIDE, SHOWN_SIDE)
    longest = max(image.size)
    wanted = [max(JPEG_DRAFT_SHORT_SIDE, draft_side * side // longest) for side in image.size]
    image.draft("RGB", (wanted[0], wanted[1]))  # no smaller than that; does nothing to other formats
    image.load()
    most = max(most, math.ceil(max(image.size) * SHORT_SIDE / min(image.size)))  # a strip must not become a thread
    picture = _to_rgb(image, most)
    picture.thumbnail((most, most))
    with suppress(Exception):  # broken metadata is no reason to refuse good pixels
        picture.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
        ImageOps.exif_transpose(picture, in_place=True)
    # Phones keep second pictures in MPO and HEIC, which are no animations.
    animated = image.format not in ("MPO", "HEIF") and getattr(image, "is_animated", False)
    picture.info = {"animated": animated}
    picture.getexif().clear()
    return picture


def _to_rgb(image: Image.Image, most: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per channel; Pillow's own conversion clips instead of scaling
        pixels = np.asarray(image).astype(np.int32) >> 8
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        layer.thumbnail((most, most))  # before the second full-size copy is made
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer.getchannel("A"))
        return picture
    if image.mode == "RGB":
        image.thumbnail((most, most))
        return image._new(image.im)  # convert would copy the pixels, which costs a quarter of the whole opening
    return image.convert("RGB")
