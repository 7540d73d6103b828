import os
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pictures import encode, noise
from PIL import Image

import images
from images import (
    MAX_MEGABYTES,
    ORIENTATION,
    SHORT_SIDE,
    SHOWN_SIDE,
    WHOLE_SIDE,
    BadImage,
    find_pictures,
    open_picture,
)

T = Image.Transpose


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean())


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "JPEG", "WEBP", "AVIF", "HEIF", "GIF"])
def test_formats_open_as_the_picture_that_was_saved(file_format: str) -> None:
    picture = noise(120, 80)
    opened = open_picture(encode(picture, file_format))
    assert (opened.mode, opened.size) == ("RGB", (120, 80))
    assert mean_difference(opened, picture) < 8  # lossy formats and GIF's palette


@pytest.mark.parametrize(
    ("file_format", "name"),
    [
        ("TIFF", "a TIFF picture"),
        ("PPM", "a Netpbm picture"),
        ("ICO", "an icon"),
        ("PDF", "a PDF document"),
        ("EPS", "a PostScript drawing"),
        ("TGA", "a Targa picture"),
        ("PCX", "a picture of a rare kind"),
    ],
)
def test_other_formats_are_refused_by_name_whatever_the_files_name(file_format: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "innocent.png"
    path.write_bytes(encode(noise(64, 64), file_format))
    with pytest.raises(BadImage, match=f"not a picture in a format we read, but {name}"):
        open_picture(path)


# How a camera that stores pixels turned has turned them, by the tag that says how to turn them back.
STORED = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
def test_pictures_come_upright(orientation: int, file_format: str) -> None:
    upright = noise(96, 64)
    turned = STORED[orientation]
    stored = upright.transpose(turned) if turned is not None else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    opened = open_picture(encode(stored, file_format, exif=exif.tobytes()))
    assert opened.size == upright.size
    assert mean_difference(opened, upright) < 5
    assert not opened.getexif()


def test_broken_metadata_does_not_cost_the_picture() -> None:
    data = encode(noise(64, 48), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    with warnings.catch_warnings(action="ignore"):  # Pillow says that the metadata is corrupt
        assert open_picture(data).size == (64, 48)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    opened = np.asarray(open_picture(encode(Image.fromarray(ramp))))
    assert (opened[..., 0] == (ramp >> 8)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))  # red that nobody was meant to see
    image.paste((0, 0, 0, 255), (0, 0, 20, 40))
    if mode == "P":
        image = image.quantize(4)
        assert image.has_transparency_data
    opened = open_picture(encode(image.convert(mode)))
    assert opened.getpixel((10, 20)) == (0, 0, 0)
    assert opened.getpixel((30, 20)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "file_format"), [("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("P", "PNG")])
def test_other_colour_modes(mode: str, file_format: str) -> None:
    grey = Image.new("RGB", (64, 64), (255, 255, 255))
    grey.paste((0, 0, 0), (0, 0, 32, 64))
    opened = open_picture(encode(grey.convert(mode), file_format))
    assert opened.mode == "RGB"
    assert mean_difference(opened, grey) < 3


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_the_first_frame_stands_for_an_animation(file_format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime", "blue")]
    opened = open_picture(encode(frames[0], file_format, save_all=True, append_images=frames[1:]))
    assert mean_difference(opened, frames[0]) < 6
    assert opened.info["animated"]
    assert not open_picture(encode(frames[0], file_format)).info["animated"]


ANIMATED: dict[str, tuple[str, dict[str, Any]]] = {
    "GIF": ("GIF", {}),
    "GIF, disposed to background": ("GIF", {"disposal": 2}),
    "GIF, disposed to previous": ("GIF", {"disposal": 3}),
    "APNG": ("PNG", {}),
    "APNG, disposed to background": ("PNG", {"disposal": 1}),
    "WebP": ("WEBP", {"lossless": True}),
    "AVIF": ("AVIF", {}),
}


def animation(kind: str, *frames: Image.Image) -> bytes:
    file_format, options = ANIMATED[kind]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:], duration=40, **options)


@pytest.mark.parametrize("colour", ["black", "white", "teal"])
@pytest.mark.parametrize("kind", ANIMATED)
def test_frames_of_one_colour_are_skipped(kind: str, colour: str) -> None:
    plain = Image.new("RGB", (64, 48), colour)
    fading = [plain, plain.point(lambda level: level ^ 2), plain.point(lambda level: level ^ 4)]
    opened = open_picture(animation(kind, *fading, noise(64, 48), noise(64, 48, 1)))
    assert mean_difference(opened, noise(64, 48)) < 8
    assert opened.info["frame"] == 3
    assert opened.info["warning"].startswith("Frame 4 of this animation was classified")


@pytest.mark.parametrize("kind", ANIMATED)
def test_an_animation_of_one_colour_is_its_first_frame(kind: str) -> None:
    plain = Image.new("RGB", (64, 48), "teal")
    opened = open_picture(animation(kind, plain, plain.point(lambda level: level ^ 2)))
    assert mean_difference(opened, plain) < 2
    assert (opened.info["frame"], opened.info["warning"]) == (0, "")


@pytest.mark.parametrize("kind", [kind for kind in ANIMATED if kind != "GIF, disposed to previous"])
def test_a_transparent_first_frame_is_skipped(kind: str) -> None:
    frames = [Image.new("RGBA", (64, 48)), noise(64, 48).convert("RGBA"), noise(64, 48, 1).convert("RGBA")]
    opened = open_picture(animation(kind, *frames))
    assert mean_difference(opened, noise(64, 48)) < 8
    assert opened.info["frame"] == 1


def webp_frame(picture: Image.Image, canvas: tuple[int, int], at: tuple[int, int]) -> bytes:
    """An animated WebP whose only frames are this picture, somewhere on a canvas (WebP container specification)."""
    chunk = encode(picture, "WEBP", lossless=True)[12:]
    place = b"".join(
        value.to_bytes(3, "little") for value in (at[0] // 2, at[1] // 2, *(side - 1 for side in picture.size))
    )
    frame = place + (100).to_bytes(3, "little") + b"\2" + chunk
    header = b"\x12\0\0\0" + b"".join((side - 1).to_bytes(3, "little") for side in canvas)
    chunks = ((b"VP8X", header), (b"ANIM", bytes(6)), (b"ANMF", frame), (b"ANMF", frame))
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def gif_frame(picture: Image.Image, canvas: tuple[int, int], at: tuple[int, int]) -> bytes:
    """A GIF whose only frame is this picture, somewhere on a canvas (GIF89a, sections 18 and 20)."""
    data = encode(picture, "GIF")
    frame = data.index(b"\x2c" + struct.pack("<4H", 0, 0, *picture.size))
    return data[:6] + struct.pack("<2H", *canvas) + data[10 : frame + 1] + struct.pack("<2H", *at) + data[frame + 5 :]


@pytest.mark.parametrize("at", [(0, 0), (20, 30), (64, 48)])
@pytest.mark.parametrize("build", [gif_frame, webp_frame])
def test_a_first_frame_may_cover_a_part_of_the_canvas(build: Callable[..., bytes], at: tuple[int, int]) -> None:
    opened = open_picture(build(noise(64, 48), (128, 96), at))
    expected = Image.new("RGB", (128, 96), "white")
    expected.paste(noise(64, 48), at)
    assert opened.size == (128, 96)
    assert mean_difference(opened, expected) < 4


@pytest.mark.parametrize("ink", ["white", (252, 253, 255), "black", "red"])
@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGBA", "GIF", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGBA", "WEBP", {}),
        ("RGBA", "AVIF", {}),
        ("RGBA", "HEIF", {}),
    ],
)
def test_white_on_transparent_is_seen(
    mode: str, file_format: str, options: dict[str, Any], ink: str | tuple[int, int, int]
) -> None:
    picture = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    picture.paste(ink, (16, 16, 48, 48))
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    opened = open_picture(encode(picture, file_format, **options)).convert("L")
    is_white = ink not in ("black", "red")
    assert cast(int, opened.getpixel((4, 4))) == pytest.approx(128 if is_white else 255, abs=3)
    assert abs(cast(int, opened.getpixel((32, 32))) - cast(int, opened.getpixel((4, 4)))) > 100


@pytest.mark.parametrize(("ink", "ground"), [(247, 128), (246, 255)])
def test_ink_that_white_does_not_hide_stays_on_white(ink: int, ground: int) -> None:
    picture = Image.new("LA", (64, 64))
    picture.paste((ink, 255), (16, 16, 48, 48))
    opened = open_picture(encode(picture)).convert("L")
    assert (opened.getpixel((4, 4)), opened.getpixel((32, 32))) == (ground, ink)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_all_over_is_white(mode: str) -> None:
    assert open_picture(encode(Image.new(mode, (64, 48)))).getcolors() == [(64 * 48, (255, 255, 255))]


@pytest.mark.parametrize("file_format", ["MPO", "HEIF"])
def test_phones_second_pictures_are_no_animation(file_format: str) -> None:
    first, second = noise(64, 48, 1), noise(64, 48, 2)
    opened = open_picture(encode(first, file_format, save_all=True, append_images=[second]))
    assert mean_difference(opened, first) < 5
    assert not opened.info["animated"]


@pytest.mark.parametrize(
    ("size", "opened_size"),
    [
        ((4000, 3000), (1000, 750)),  # a quarter
        ((1500, 900), (SHOWN_SIDE, 876)),  # a half would be too small
        ((4000, 700), (SHOWN_SIDE, 256)),  # of a quarter, too little would be left across
        ((300, 15000), (SHORT_SIDE, 8000)),  # 28 pixels across would be too few for the network
    ],
)
def test_large_photos_come_smaller(size: tuple[int, int], opened_size: tuple[int, int]) -> None:
    photo = noise(*size)
    opened = open_picture(encode(photo, "JPEG"))
    assert opened.size == opened_size
    assert mean_difference(opened, photo.resize(opened.size)) < 3


@pytest.mark.parametrize(("size", "whole_size"), [((2000, 1501), (2000, 1501)), ((6000, 400), (WHOLE_SIDE, 313))])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_whole_picture_keeps_its_size_up_to_a_limit(
    file_format: str, size: tuple[int, int], whole_size: tuple[int, int]
) -> None:
    photo = noise(*size)
    whole = open_picture(encode(photo, file_format), whole=True)
    assert whole.size == whole_size
    assert mean_difference(whole, photo.resize(whole.size)) < 6  # JPEG's, on noise


def test_a_50_megapixel_jpeg_opens() -> None:
    assert open_picture(encode(Image.new("L", (8160, 6120)), "JPEG")).size == (1020, 765)


def test_a_48_megapixel_heic_opens() -> None:
    photo = Image.new("L", (8064, 6048), 220)
    photo.paste(40, (0, 0, 4032, 6048))
    opened = open_picture(encode(photo, "HEIF", quality=10, enc_params={"preset": "ultrafast"}))
    assert opened.size == (SHOWN_SIDE, 1095)
    assert mean_difference(opened, photo.resize(opened.size).convert("RGB")) < 3


def test_the_sentence_about_a_larger_heic_says_what_to_do() -> None:
    data = bytearray(encode(noise(64, 64), "HEIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 8200, 6200)
    with pytest.raises(BadImage, match=r"8200 × 6200 pixels; .* for HEIC 50; save it smaller or as JPEG"):
        open_picture(bytes(data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "sentence"),
    [
        (7000, 6000, "7000 × 6000 pixels; the limit is 36 megapixels, for JPEG 64"),
        (9400, 9400, "too large to open safely; the limit is 36 megapixels, for JPEG 64"),
        (60000, 60000, "too large to open safely"),
        (20001, 100, "no side may exceed 20000"),
        (400, 15, "each side needs at least 16"),
    ],
)
def test_sizes_are_judged_before_decoding(
    width: int, height: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_image: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(images, "_decode", decode)
    with pytest.raises(BadImage, match=sentence):
        open_picture(png_header(width, height))


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """Each scan costs a pass over all pixels: 10 MB of them would hold a core for minutes."""
    data = encode(noise(64, 64), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff\xda", start + 2)]
    assert open_picture(data[:-2] + scan * 3 + data[-2:]).size == (64, 64)
    with pytest.raises(BadImage, match="more scans than any camera"):
        open_picture(data[:-2] + scan * 200 + data[-2:])


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF"])
def test_truncated_files_are_refused_in_one_sentence(file_format: str) -> None:
    data = encode(noise(200, 200), file_format)
    with pytest.raises(BadImage, match=r"damaged or incomplete|not a picture"):
        open_picture(data[: len(data) // 2])


def test_damaged_files_never_raise_anything_else() -> None:
    draw = np.random.default_rng(0)
    opened = 0
    for file_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "HEIF", "MPO"):
        original = np.frombuffer(encode(noise(64, 48), file_format), np.uint8)
        for _ in range(60):
            damaged = original.copy()
            at = draw.integers(0, len(damaged), draw.integers(1, 9))
            damaged[at] = draw.integers(0, 256, len(at))
            try:
                picture = open_picture(damaged.tobytes())
            except BadImage as error:
                assert str(error).endswith(".")
                assert "\n" not in str(error)
            else:
                opened += 1
                assert picture.mode == "RGB"
    assert 0 < opened < 480  # some damage is harmless, some isn't


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "huge.png").write_bytes(b"\0" * (MAX_MEGABYTES * 1_000_000 + 1))
    os.mkfifo(tmp_path / "pipe.png")
    for name, sentence in (
        ("empty.png", "This file is empty."),
        ("huge.png", "This file has 10.0 MB; the limit is 10 MB."),
        ("pipe.png", "This is not a file."),
        ("missing.png", "There is no such file."),
        ("", "This folder cannot be read."),
    ):
        with pytest.raises(BadImage) as caught:
            open_picture(tmp_path / name)
        assert str(caught.value) == sentence
    with pytest.raises(BadImage, match="the limit is 10 MB"):
        open_picture(b"\0" * (MAX_MEGABYTES * 1_000_000 + 1))


def test_a_path_and_its_bytes_give_the_same_picture(tmp_path: Path) -> None:
    data = encode(noise(50, 70))
    (tmp_path / "a.png").write_bytes(data)
    assert mean_difference(open_picture(tmp_path / "a.png"), open_picture(data)) == 0
    assert mean_difference(open_picture(str(tmp_path / "a.png")), open_picture(data)) == 0


def test_a_folder_that_cannot_be_read_is_among_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's refusal is played."""
    for name in ("closed/1.png", "open/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert find_pictures(tmp_path) == [tmp_path / "closed", tmp_path / "open" / "2.png"]


def test_find_pictures_looks_into_every_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/2.JPG", "1.webp", "notes.txt", "b/3.heic"):
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)] == [
        "1.webp",
        "b/2.JPG",
        "b/3.heic",
    ]


def test_the_fixture_encodes_what_pillow_reads() -> None:
    assert Image.open(BytesIO(png_header(30, 40))).size == (30, 40)
