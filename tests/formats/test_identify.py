"""What people are told about files that are no pictures, or pictures of a kind that no decoder here reads."""

import gzip
import random
import struct
import time
from collections.abc import Iterator

import pytest
from pictures import encode, noise

from images import BadImage, open_picture

PICTURE = noise(64, 48)
JPEG = encode(PICTURE, "JPEG")
FRAME = JPEG.index(b"\xff\xc0")  # marker, length, bits, height and width (ITU T.81, B.2.2)
EXPORT = "export it as JPEG or PNG."
SCREENSHOT = "take a screenshot of the part that matters."
STILL = "take a screenshot of the moment that matters."
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
XML = b'<?xml version="1.0"?>\n'
EBML = b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\xf7\x81\x01\x42\xf2\x81\x04\x42\xf3\x81\x08\x42\x82"


def sentence(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        open_picture(data)
    return str(caught.value)


def jpeg_with(code: int, bits: int = 8, height: int = 48) -> bytes:
    """A JPEG whose frame header has another code, another number of bits or another height."""
    frame = struct.pack(">BBHBH", 0xFF, code, 17, bits, height)
    return JPEG[:FRAME] + frame + JPEG[FRAME + 7 :]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (jpeg_with(0xC1, 12), "12 bits per channel"),
        (jpeg_with(0xC2, 12), "12 bits per channel"),
        (jpeg_with(0xC3), "lossless compression"),
        (jpeg_with(0xC3, 16), "lossless compression"),
        (jpeg_with(0xCB), "lossless compression"),
        (jpeg_with(0xF7), "JPEG-LS compression"),
        (jpeg_with(0xC5), "hierarchical compression"),
        (jpeg_with(0xCA), "arithmetic coding"),
        (jpeg_with(0xC0, height=0), r"its height stored after its pixels \(DNL\)"),
        (jpeg_with(0xC2, height=0), r"its height stored after its pixels \(DNL\)"),
    ],
)
def test_an_unusual_jpeg_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(BadImage, match=f"^This JPEG has {kind}, which we do not read: {EXPORT}$"):
        open_picture(data)


def tiff(order: str, *entries: tuple[int, int, int, bytes], version: int = 42) -> bytes:
    """The start of a TIFF with these entries: tag, type, count and value or, of a text, its characters (TIFF 6.0)."""
    texts, at = b"", 10 + 12 * len(entries)
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        is_text = len(value) > 4
        directory += struct.pack(order + "HHI", tag, kind, count)
        directory += struct.pack(order + "I", at + len(texts)) if is_text else value.ljust(4, b"\0")
        texts += value if is_text else b""
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(order + "HI", version, 8) + directory + texts + bytes(300)


def raw(order: str, maker: bytes) -> bytes:
    """The start of a camera's RAW file: a thumbnail, and who made the camera."""
    return tiff(order, (254, 4, 1, struct.pack(order + "I", 1)), (271, 2, len(maker), maker))


def files() -> Iterator[tuple[str, bytes, str, str]]:
    """Yield a name for each file, its content, what it is and what to do."""
    yield "JPEG XL codestream", b"\xff\x0a" + bytes(range(200)), "a JPEG XL picture", EXPORT
    yield "JPEG XL container", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl " + bytes(99), "a JPEG XL picture", EXPORT
    yield "PSD", b"8BPS\0\1" + bytes(99), "a Photoshop file (PSD or PSB)", EXPORT
    yield "PSB", b"8BPS\0\2" + bytes(99), "a Photoshop file (PSD or PSB)", EXPORT
    canon = "a camera's RAW file (Canon CR2, CR3 or CRW)"
    yield "CR2", b"II*\0\x10\0\0\0CR\2\0" + bytes(300), canon, EXPORT
    yield "CR3", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(300), canon, EXPORT
    yield "CRW", b"II\x1a\0\0\0HEAPCCDR" + bytes(200), canon, EXPORT
    yield "RAF", b"FUJIFILMCCD-RAW 0201FF" + bytes(300), "a camera's RAW file (Fujifilm RAF)", EXPORT
    yield "ORF", b"IIRO\x08\0\0\0" + bytes(300), "a camera's RAW file (Olympus ORF)", EXPORT
    yield "RW2", b"IIU\0\x18\0\0\0" + bytes(300), "a camera's RAW file (Panasonic RW2)", EXPORT
    like = "a camera's RAW file (DNG, NEF, ARW or the like)"
    for order in "<>":
        yield f"TIFF {order}", tiff(order, (256, 4, 1, b"\0\0\0\0")), "a TIFF picture", EXPORT
        yield f"BigTIFF {order}", tiff(order, version=43), "a TIFF picture", EXPORT
        yield f"DNG {order}", tiff(order, (50706, 1, 4, b"\1\4\0\0")), like, EXPORT
        yield f"NEF {order}", raw(order, b"NIKON CORPORATION\0"), like, EXPORT
        yield f"ARW {order}", raw(order, b"SONY \0"), like, EXPORT
        maker = tiff(order, (271, 2, 7, b"PENTAX\0"))
        yield f"PEF {order}", maker, "a TIFF picture or a camera's RAW file", EXPORT
    comment = b"<!--" + bytes(random.Random(0).choices(range(97, 123), k=50_000)) + b"-->"
    for name, before in (
        ("bare", b""),
        ("byte-order mark", b"\xef\xbb\xbf"),
        ("XML", XML),
        ("mark and XML", b"\xef\xbb\xbf" + XML),
        ("comments", XML + b"<!-- made by <html> -->\n<!-- and --> \n"),
        ("comment of two lines", b"<!-- made\nby hand -->"),
        ("long comment", XML + comment),
        ("doctype", XML + b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd">\n'),
        ("entities", b'<!DOCTYPE svg [\n<!ENTITY a "b">\n]>'),
    ):
        yield f"SVG, {name}", before + SVG, "an SVG drawing", EXPORT
        yield f"SVGZ, {name}", gzip.compress(before + SVG), "an SVG drawing", EXPORT
    for encoding in ("utf-16-le", "utf-16-be"):
        yield f"SVG, {encoding}", ("\ufeff" + (XML + SVG).decode()).encode(encoding), "an SVG drawing", EXPORT
    yield "SVG, comments around", b"<!-- one --><svg><!-- two --></svg>", "an SVG drawing", EXPORT
    yield "SVG, prefix", XML + b'<s:svg xmlns:s="http://www.w3.org/2000/svg"/>', "an SVG drawing", EXPORT
    for name, before in (("bare", b""), ("mark", b"\xef\xbb\xbf"), ("junk", b"\n\xff\0 junk" * 100)):
        yield f"PDF, {name}", before + encode(PICTURE, "PDF"), "a PDF document", SCREENSHOT
    for brand in (b"isom", b"mp42", b"avc1", b"M4V ", b"3gp5", b"dash"):
        yield f"MP4 {brand!r}", b"\0\0\0\x18ftyp" + brand + bytes(99), "a video (MP4)", STILL
    yield "MOV", b"\0\0\0\x14ftypqt  " + bytes(99), "a video (QuickTime MOV)", STILL
    yield "MOV, old", b"\0\0\0\x08wide\0\1\2\3mdat" + bytes(99), "a video (QuickTime MOV)", STILL
    yield "MOV, moov", b"\0\0\x10\0moov\0\0\0\x6cmvhd" + bytes(99), "a video (QuickTime MOV)", STILL
    yield "WebM", EBML + b"\x84webm" + bytes(50), "a video (WebM)", STILL
    yield "MKV", EBML + b"\x88matroska" + bytes(50), "a video (Matroska MKV)", STILL
    yield "AVI", b"RIFF\0\0\1\0AVI LIST" + bytes(50), "a video (AVI)", STILL
    yield "MPEG", b"\0\0\1\xba" + bytes(50), "a video", STILL
    yield "transport stream", 4 * (b"G" + bytes(187)), "a video", STILL
    yield "AVCHD", 4 * (bytes(4) + b"G" + bytes(187)), "a video", STILL
    sequence = b"\0\0\0\x18ftyphevc\0\0\0\0msf1hevc\0\0\0\xc8moov" + bytes(300)
    yield "HEIC without a still picture", sequence, "an animation in HEIC", STILL
    yield (
        "ZIP",
        b"PK\x03\x04" + bytes(26) + b"a.jpg",
        "an archive (ZIP or the like)",
        ("unpack it and choose the pictures in it."),
    )
    yield "DOCX", b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "an office document", SCREENSHOT
    for page in (b"<!doctype html><title>a</title>", XML + b"<html/>", b"<html><body><svg/></body></html>"):
        yield f"web page {page!r}", page, "a web page (HTML)", "choose a picture."
    yield "sound", b"\0\0\0\x18ftypM4A " + bytes(99), "a sound recording", "choose a picture."
    yield "text", b"see you at 8", "text", "choose a picture."
    yield "XML", XML + b"<gpx/>", "text", "choose a picture."


@pytest.mark.parametrize(("data", "what", "advice"), [pytest.param(*rest, id=name) for name, *rest in files()])
def test_a_file_is_named_by_what_it_is(data: bytes, what: str, advice: str) -> None:
    assert sentence(data) == f"This file is not a picture in a format we read, but {what}: {advice}"


def test_a_file_that_nobody_knows_gets_the_list_of_formats() -> None:
    assert sentence(random.Random(3).randbytes(500)) == (
        "This file is not a picture in a format we read: JPEG, PNG, WebP, GIF, BMP, AVIF or HEIC."
    )


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF"])
def test_a_damaged_picture_is_no_other_file(file_format: str) -> None:
    data = encode(PICTURE, file_format)
    assert sentence(data[: len(data) // 3]) == "This picture is damaged or incomplete and cannot be opened."


@pytest.mark.parametrize("piece", [b"<!---->", b"<!--", b"<?", b"<!doctype ", b"<!doctype a[", b"]", b" ", b"<a:"])
def test_no_repetition_takes_long(piece: bytes) -> None:
    start = time.process_time()
    sentence(b"<!doctype a[" * (piece == b"]") + piece * 10_000)
    assert time.process_time() - start < 0.5
