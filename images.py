"""Open untrusted pictures: the one way in for page, command line, HTTP, training and evaluation."""

import fnmatch
import glob
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

from borders import content_box
from formats.bmp import BMP_START, with_known_masks
from formats.identify import DAMAGED, NOT_READ, why_unreadable
from formats.jpeg import JPEG_START, START_OF_SCAN, JpegFile, count_segments, may_lack_rows, missing_share
from formats.png import PNG_START, essential_png

# Pillow would open over forty formats by their first bytes; nearly all of its security
# advisories concern the ones left out here. "JPEG" also admits the MPO files of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIF")
JPEG = ("JPEG", "MPO")  # what Pillow calls them once they are open
FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, AVIF or HEIC"
SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp", "mpo", "png", "apng", "webp", "gif", "bmp"),
    *("avif", "avifs", "heic", "heics", "heif", "heifs", "hif"),  # .HIF: cameras of Sony, Canon and Fujifilm
)
# Folders in which systems and programs keep thumbnails, metadata and deleted files, in lower case.
SYSTEM_FOLDERS = frozenset(
    (
        *("__macosx", "network trash folder", "temporary items"),  # macOS, in ZIP files and on network drives
        *("$recycle.bin", "recycler", "recycled", "system volume information"),  # Windows
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),  # Synology, QNAP
        "lost+found",
    )
)
ISO_MEDIA_BRANDS = (  # ISO 14496-12: bytes 8 to 12 of AVIF and HEIF files
    *(b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
)
SIGNATURE_BYTES = 18

MAX_MEGABYTES = 10
MAX_PIXELS = 36_000_000
MAX_JPEG_PIXELS = 64_000_000  # 50-megapixel phones pass: JPEGs are decoded at a fraction of their size
MAX_HEIC_PIXELS = 50_000_000  # 48-megapixel phones pass; decoding takes 350 MB
MEGAPIXELS = (
    f"the limit is {MAX_PIXELS // 1_000_000} megapixels, for JPEG {MAX_JPEG_PIXELS // 1_000_000} "
    f"and for HEIC {MAX_HEIC_PIXELS // 1_000_000}; save it smaller or as JPEG"
)
MAX_SIDE = 20_000  # pixels
MIN_SIDE = 16  # pixels
MAX_JPEG_SCANS = 100  # cameras write 1, progressive files about 10; each costs a pass over all pixels
MAX_JPEG_SEGMENTS = 5000  # before the first scan; Pillow takes 2 µs for each, and 10 MB of metadata have 150
MAX_MISSING = 0.05  # share of a JPEG's rows that may be missing
MAX_FRAMES = 50  # of an animation that are searched for one that is not of one colour
ONE_COLOUR = 8  # of 255 steps by which a picture of one colour may vary, after lossy compression
JPEG_DRAFT_SIDE = 1000  # pixels of the longest side; a quarter of a 12-megapixel photo's
JPEG_DRAFT_SHORT_SIDE = 320  # pixels; twice the network's input
SHOWN_SIDE = 1460  # pixels; Streamlit encodes anything wider a second time
SHORT_SIDE = 160  # pixels that the other side keeps; the network's input
WHOLE_SIDE = 4700  # pixels; a 16-megapixel photo's
ORIENTATION = 0x0112  # EXIF 2.32

register_heif_opener()
# Both are process-wide and set once: per-call `warnings.catch_warnings` is not thread-safe.
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # so Pillow itself refuses what is larger still
warnings.simplefilter("error", Image.DecompressionBombWarning)


class BadImage(ValueError):
    """A picture that cannot be used. Its text is one sentence for the person who sent it."""


def open_picture(source: bytes | str | os.PathLike[str], *, whole: bool = False) -> Image.Image:
    """Decode untrusted bytes, or the file at a path, into an upright RGB picture.

    Animations are represented by their first frame that is not of one colour. Transparent pictures are placed on
    white, or on grey if white would hide all of them. The longest side is at most `SHOWN_SIDE` pixels, unless that
    would leave less than `SHORT_SIDE` of the other.

    Args:
        source: the encoded picture, or its path.
        whole: keep the picture's own size, up to `WHOLE_SIDE`: for storing a picture, not for classifying it.

    Returns:
        A loaded picture in mode RGB without metadata. Its `info` has the keys "animated" (bool), "frame" (index of the
        frame) and "warning" (a sentence for the user if rows are missing or frames were skipped, else empty).

    Raises:
        BadImage: if this is not a readable picture within the limits.
    """
    data = source if isinstance(source, bytes) else _read_file(Path(source))
    if not data:
        raise BadImage("This file is empty.")
    if len(data) > MAX_MEGABYTES * 1_000_000:
        raise BadImage(_too_many_bytes(len(data)))
    try:
        file = _as_file(data)
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image)
            if image.format in JPEG and _count_scans(data) > MAX_JPEG_SCANS:
                raise BadImage("This JPEG has more scans than any camera or program writes.")
            return _decode(image, file, whole)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BadImage(f"This picture is too large to open safely; {MEGAPIXELS}.") from error
    except Exception as error:  # decoders fed with hostile bytes raise nearly anything
        raise BadImage(why_unreadable(data) or f"{NOT_READ}: {FORMAT_NAMES}.") from error


def to_square(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """Crop a picture to its `content_box` and stretch it to a square array of shape (side, side, 3).

    A centre crop would cut off captions, which stand at the edges of memes. Letterboxing would spend a third of the
    square on padding for a 3:2 photo, and look like the white bar above a captioned picture.
    """
    box = content_box(picture)
    return resize_to_square(picture.crop(box) if box else picture, side)


def resize_to_square(picture: Image.Image, side: int) -> NDArray[np.uint8]:
    """Stretch a picture, without cropping it first, to a square array of shape (side, side, 3)."""
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0))


def has_signature(head: bytes) -> bool:
    """Whether the first `SIGNATURE_BYTES` of a file are those of a format in `FORMATS`."""
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")):
        return True
    if head.startswith(b"BM"):  # two letters prove little; the size of the second header is at most 124
        return 12 <= int.from_bytes(head[14:18], "little") <= 124
    return (head[:4], head[8:12]) == (b"RIFF", b"WEBP") or (head[4:8] == b"ftyp" and head[8:12] in ISO_MEDIA_BRANDS)


def has_suffix(name: str) -> bool:
    """Whether a file's name ends like a picture's."""
    return os.path.splitext(name)[1][1:].lower() in SUFFIXES  # noqa: PTH122  (a Path for each file takes long)


def is_hidden_folder(name: str) -> bool:
    """Whether searches leave out folders of this name."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def find_pictures(folder: Path) -> list[Path]:
    """Every picture below a folder, as `PictureSearch` finds them."""
    return PictureSearch().in_folder(folder)


@dataclass
class PictureSearch:
    """A search for pictures that notes what it leaves out.

    Attributes:
        include_hidden: also search hidden and system folders, and take hidden files.
        follow_links: also search folders behind symbolic links, each folder once.
        all_files: also take files whose content, not their name, says that they are pictures.
        skipped_files: those that are hidden or no pictures.
        hidden_folders: those not searched because of their names.
        linked_folders: those not searched because they are links.
    """

    include_hidden: bool = False
    follow_links: bool = False
    all_files: bool = False
    skipped_files: set[str] = field(default_factory=set)
    hidden_folders: set[str] = field(default_factory=set)
    linked_folders: set[str] = field(default_factory=set)

    def in_folder(self, folder: Path) -> list[Path]:
        """Every picture below a folder, sorted by path; the folder itself may be hidden or a link.

        Folders that cannot be read are among them, so that opening them says why.
        """
        found = list[Path]()
        for path, entries in self._walk(str(folder)):
            if entries is None:
                found.append(Path(path))
                continue
            for entry in entries:
                if _is_folder(entry):
                    continue
                if self._is_picture(entry):
                    found.append(Path(entry.path))
                else:
                    self.skipped_files.add(entry.path)
        return sorted(found)

    def matching(self, pattern: str) -> list[Path]:
        """The files that a pattern of the shell matches, and the pictures in the folders that it matches, sorted.

        What exists under a part of the pattern, such as a folder "Trip [2019]", is meant. Otherwise each [...] is read
        both as a class and as it stands. A bare `*` or `**` at the end names no kind of file and finds pictures only.
        """
        parts = Path(pattern).parts
        if parts[-1] == "**":
            parts = parts[:-1]
        only_folders = pattern.endswith(("/", os.sep))
        found = dict[Path, None]()
        for match in dict.fromkeys(self._expand("", parts)):
            if os.path.isdir(match):  # noqa: PTH112  (Path.is_dir can raise)
                found |= dict.fromkeys(self.in_folder(Path(match)))
            elif not only_folders:
                found[Path(match)] = None
        return sorted(found)

    def _expand(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        """Each path below a folder, "" for the current one, that a pattern's parts match."""
        if not parts:
            yield folder or "."
            return
        part, *rest = parts
        if part == "**":
            for path, entries in self._walk(folder):
                yield from self._expand(path, rest if entries is not None else ())
        elif os.path.lexists(path := os.path.join(folder, part)):  # noqa: PTH118  (a Path is never "")
            yield from self._expand(path, rest)
        elif glob.has_magic(part):
            for path in self._matches(folder, part, is_last=not rest):
                yield from self._expand(path, rest)

    def _matches(self, folder: str, part: str, *, is_last: bool) -> Iterator[str]:
        """Each path in a folder that one part of a pattern matches; files only if it is the last part."""
        matches, names_hidden = _name_pattern(part).fullmatch, part.startswith(".")
        for entry in _entries(folder) or ():
            if entry.name.startswith(".") and not (names_hidden or self.include_hidden):
                continue
            if not matches(entry.name):
                continue
            if _is_folder(entry):
                if names_hidden or self._is_searched(entry):
                    yield entry.path
            elif is_last and (part != "*" or self._is_picture(entry)):
                yield entry.path
            elif is_last:
                self.skipped_files.add(entry.path)

    def _walk(self, folder: str) -> Iterator[tuple[str, list[os.DirEntry[str]] | None]]:
        """Each folder to search with its entries, or None if it cannot be read; linked ones last."""
        waiting, linked = [folder], deque[str]()
        searched = set[str]()
        while waiting or linked:
            path = waiting.pop() if waiting else linked.popleft()
            if self.follow_links:  # a link may lead back
                real = os.path.realpath(path)
                if real in searched:
                    continue
                searched.add(real)
            yield path, (entries := _entries(path))
            for entry in entries or ():
                if _is_folder(entry) and self._is_searched(entry):
                    (linked if entry.is_symlink() else waiting).append(entry.path)

    def _is_searched(self, folder: os.DirEntry[str]) -> bool:
        """Whether to search a folder; one that is left out is noted."""
        if is_hidden_folder(folder.name) and not self.include_hidden:
            self.hidden_folders.add(folder.path)
            return False
        if folder.is_symlink() and not self.follow_links:
            self.linked_folders.add(folder.path)
            return False
        return True

    def _is_picture(self, file: os.DirEntry[str]) -> bool:
        if file.name.startswith(".") and not self.include_hidden:
            return False
        if has_suffix(file.name) or not self.all_files:
            return has_suffix(file.name)
        try:
            if not file.is_file():  # a pipe would never end
                return False
            with open(file.path, "rb") as content:  # noqa: PTH123
                return has_signature(content.read(SIGNATURE_BYTES))
        except OSError:
            return True  # opening it says why


def _entries(folder: str) -> list[os.DirEntry[str]] | None:
    """What is in a folder, "" for the current one; nothing if it is gone, None if it cannot be read."""
    try:
        with os.scandir(folder or ".") as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        return None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _name_pattern(part: str) -> re.Pattern[str]:
    """A pattern's part as a regular expression; each [...] also matches itself literally."""

    def translate(piece: str) -> str:
        if len(piece) == 1:
            return {"*": ".*", "?": "."}.get(piece, re.escape(piece))
        return f"(?:{re.escape(piece)}|{fnmatch.translate(piece)[:-2]})"  # less the \Z or \z at its end

    pieces = re.findall(r"\[!?.[^]]*\]|.", part, re.DOTALL)
    return re.compile("".join(map(translate, pieces)), re.DOTALL | (re.IGNORECASE if os.name == "nt" else 0))


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
    limits = {"JPEG": MAX_JPEG_PIXELS, "MPO": MAX_JPEG_PIXELS, "HEIF": MAX_HEIC_PIXELS}
    if width * height > limits.get(image.format or "", MAX_PIXELS):
        raise BadImage(f"This picture has {width} × {height} pixels; {MEGAPIXELS}.")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"This picture has {width} × {height} pixels; no side may exceed {MAX_SIDE}.")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"This picture has {width} × {height} pixels; each side needs at least {MIN_SIDE}.")


def _count_scans(jpeg: bytes) -> int:
    """The number of a JPEG's scans, or more: thumbnails are counted, too."""
    code = np.frombuffer(jpeg, np.uint8)
    markers = code[np.flatnonzero(code[:-1] == 0xFF) + 1]  # bytes.count takes 5 % of the time to open a photo
    return int(np.count_nonzero(markers == START_OF_SCAN))


def _as_file(data: bytes) -> BytesIO:
    """The file for Pillow, after repairs that make it read what browsers show."""
    if data.startswith(JPEG_START):
        if count_segments(data, MAX_JPEG_SEGMENTS) > MAX_JPEG_SEGMENTS:
            raise BadImage("This JPEG has more segments than any camera or program writes.")
        return JpegFile(data)
    if data.startswith(PNG_START):
        return BytesIO(essential_png(data))
    return BytesIO(with_known_masks(data) if data.startswith(BMP_START) else data)


def _decode(image: Image.Image, file: BytesIO, whole: bool) -> Image.Image:
    draft_side, most = (WHOLE_SIDE, WHOLE_SIDE) if whole else (JPEG_DRAFT_SIDE, SHOWN_SIDE)
    draft_size = _draft_size(image.size, draft_side)
    image.draft("RGB", draft_size)  # no smaller than that; does nothing to most formats
    image.load()
    warning = ""
    if isinstance(file, JpegFile) and (file.ran_out or may_lack_rows(file.getvalue(), image)):
        warning = _warn_of_missing(missing_share(file.getvalue(), image, draft_size))
    most = max(most, math.ceil(max(image.size) * SHORT_SIDE / min(image.size)))  # keep the short side of long pictures
    frame, picture = 0, _to_rgb(_on_canvas(image), most)
    # Phones keep second pictures in MPO and HEIC, which are no animations.
    animated = image.format not in ("MPO", "HEIF") and getattr(image, "is_animated", False)
    if animated and _is_one_colour(picture):
        frame, picture = _find_visible_frame(image, picture.copy(), most)
        if frame:
            warning = (
                f"Frame {frame + 1} of this animation was classified, because those before it show only one colour."
            )
    picture.thumbnail((most, most))
    with suppress(Exception):  # broken metadata is no reason to refuse good pixels
        picture.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
        ImageOps.exif_transpose(picture, in_place=True)
    picture.info = {"animated": animated, "frame": frame, "warning": warning}
    picture.getexif().clear()
    return picture


def _draft_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The least size at which a JPEG is decoded, whose longest side then has this many pixels."""
    width, height = (max(JPEG_DRAFT_SHORT_SIDE, side * length // max(size)) for length in size)
    return width, height


def _warn_of_missing(share: float) -> str:
    if share > MAX_MISSING:
        raise BadImage(DAMAGED)
    return f"The last {max(share, 0.01):.0%} of this picture is missing, because its file ends early." if share else ""


def _find_visible_frame(image: Image.Image, first: Image.Image, most: int) -> tuple[int, Image.Image]:
    """The first frame that is not of one colour, and its index, in an animation that fades in."""
    with suppress(Exception):  # raised at the animation's end, or where it is damaged
        for index in range(1, min(MAX_FRAMES, MAX_PIXELS // (image.width * image.height))):
            image.seek(index)
            image.load()
            picture = _to_rgb(image, most)
            if not _is_one_colour(picture):
                return index, picture
    return 0, first


def _on_canvas(image: Image.Image) -> Image.Image:
    """The whole canvas of a first frame that covers a part of it. Pillow fills the rest with some colour."""
    extent = getattr(image, "dispose_extent", None)  # of GIF and APNG
    if extent is None or extent == (0, 0, *image.size):
        return image
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.crop(extent).convert("RGBA"), extent[:2])
    return canvas


def _to_rgb(image: Image.Image, most: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per channel; Pillow's own conversion clips instead of scaling
        values = np.asarray(image)
        grey = Image.fromarray((values >> 8).astype(np.uint8))
        if "transparency" not in image.info:
            return grey.convert("RGB")
        image = Image.merge("LA", (grey, Image.fromarray(values != image.info["transparency"]).convert("L")))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if image.format == "BMP" and not layer.getchannel("A").getbbox():
            return layer.convert("RGB")  # clipboards declare an alpha channel and leave it empty
        layer.thumbnail((most, most))  # before the second full-size copy is made
        on_white, on_grey = _on_ground(layer, "white"), _on_ground(layer, "grey")
        return on_grey if _is_one_colour(on_white) and not _is_one_colour(on_grey) else on_white
    if image.mode == "RGB":
        picture = image._new(image.im)  # convert would copy the pixels, which costs a quarter of the whole opening
        picture.thumbnail((most, most))
        return picture
    return image.convert("RGB")


def _on_ground(layer: Image.Image, colour: str) -> Image.Image:
    picture = Image.new("RGB", layer.size, colour)
    picture.paste(layer, mask=layer.getchannel("A"))
    return picture


def _is_one_colour(picture: Image.Image) -> bool:
    ranges = cast(tuple[tuple[int, int], ...], picture.getextrema())
    return all(high - low <= ONE_COLOUR for low, high in ranges)
