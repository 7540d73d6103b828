"""Say what a file is that cannot be opened as a picture, and what to do about it."""

import re
import zlib
from contextlib import suppress

from formats.jpeg import FRAMES, JPEG_START, segments

DAMAGED = "This picture is damaged or incomplete and cannot be opened."
NOT_READ = "This file is not a picture in a format we read"

HEAD = 4096  # bytes at a file's start that tell what it is
GZIP = 31  # zlib's `wbits` for it

# Formats of images.FORMATS: a file that starts like one is damaged if it cannot be opened.
OURS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|RIFF....WEBP"
    rb"|.{4}ftyp(avif|avis|hei[cmsx]|hev[cmsx]|mif1|msf1)",
    re.DOTALL,
)

EXPORT = "export it as JPEG or PNG"
SCREENSHOT = "take a screenshot of the part that matters"
STILL = "take a screenshot of the moment that matters"
UNPACK = "unpack it and choose the pictures in it"
CHOOSE = "choose the picture itself"

TIFF = rb"(II\*\0|MM\0\*)"
# The tag DNGVersion, or NewSubfileType that says that the first picture is a thumbnail, in either byte order.
RAW_TAGS = (
    rb"(\x12\xc6\x01\0\x04\0\0\0|\xc6\x12\0\x01\0\0\0\x04"
    rb"|\xfe\0\x04\0\x01\0\0\0\x01\0\0\0|\0\xfe\0\x04\0\0\0\x01\0\0\0\x01)"
)
CAMERAS = (
    rb"(Canon|EPSON|FUJIFILM|Hasselblad|(?i:kodak)|Leaf|LEICA|Mamiya|NIKON|OLYMPUS|Panasonic|PENTAX|Phase One|RICOH"
    rb"|SAMSUNG|SONY)"
)

# A pattern of the first bytes, what such a file is, and what to do. The first that matches counts.
OTHERS = [
    (re.compile(pattern, re.DOTALL), what, advice)
    for pattern, what, advice in (
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", EXPORT),
        (rb"\0\0\0\x0cjP|\xff\x4f\xff\x51", "a JPEG 2000 picture", EXPORT),
        (rb"II\xbc", "a JPEG XR picture", EXPORT),
        (rb"II\*\0....CR|.{4}ftypcrx |II\x1a\0\0\0HEAP", "a camera's RAW file (Canon CR2, CR3 or CRW)", EXPORT),
        (rb"FUJIFILMCCD-RAW", "a camera's RAW file (Fujifilm RAF)", EXPORT),
        (rb"IIR[OS]|MMOR", "a camera's RAW file (Olympus ORF)", EXPORT),
        (rb"IIU\0", "a camera's RAW file (Panasonic RW2)", EXPORT),
        (rb"FOVb|\0MRM", "a camera's RAW file", EXPORT),
        (TIFF + rb".*" + RAW_TAGS, "a camera's RAW file (DNG, NEF, ARW or the like)", EXPORT),
        (TIFF + rb".*" + CAMERAS, "a TIFF picture or a camera's RAW file", EXPORT),
        (rb"II[*+]\0|MM\0[*+]", "a TIFF picture", EXPORT),
        (rb"8BPS", "a Photoshop file (PSD or PSB)", EXPORT),
        (rb"gimp xcf", "a GIMP file (XCF)", EXPORT),
        (rb"\0\0[\x01\x02]\0[^\0]\0|icns", "an icon", EXPORT),
        (rb"\0\0[\x02\x03\x0a\x0b]\0\0\0\0\0", "a Targa picture (TGA)", EXPORT),
        (rb"P[1-7]\s", "a Netpbm picture (PPM, PGM or PBM)", EXPORT),
        (
            rb"qoif|#\?R|DDS |SIMPLE  =|BPG\xfb|FLIF|AT&TFORM|\x0a[\0-\x05]\x01[\x01\x02\x04\x08]",
            "a picture of a rare kind",
            EXPORT,
        ),
        (rb"\x76\x2f\x31\x01|[\x8a\x8b][MJ]NG|.{128}DICM|\xd7\xcd\xc6\x9a", "a picture of a rare kind", EXPORT),
        (rb"\s*%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing (EPS)", EXPORT),
        (rb".{0,1000}%PDF-", "a PDF document", SCREENSHOT),
        (rb".{4}ftypqt|\0.{3}(moov|wide|free|skip|pnot)|.{4}mdat", "a video (QuickTime MOV)", STILL),
        (rb".{4}ftypM4A |ID3|\xff[\xf2\xf3\xfb]|fLaC|OggS|RIFF....WAVE", "a sound recording", CHOOSE),
        (rb".{4}ftyp", "a video (MP4)", STILL),
        (rb"\x1a\x45\xdf\xa3.{0,60}webm", "a video (WebM)", STILL),
        (rb"\x1a\x45\xdf\xa3", "a video (Matroska MKV)", STILL),
        (rb"RIFF....AVI ", "a video (AVI)", STILL),
        (rb"FLV\x01|\0\0\x01[\xb3\xba]|\x30\x26\xb2\x75|G.{187}G.{187}G", "a video", STILL),
        (
            rb"(?i)[^<]{0,9}(<!--.*?-->\s*)*<(!doctype html|html|head|body)|\s*<\?xml.*?<html",
            "a web page (HTML)",
            CHOOSE,
        ),
        (rb"(?i)[^<]{0,9}<(svg|(\?xml|!--|!doctype svg).*?<svg)", "an SVG drawing", EXPORT),
        (
            rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|docProps/|word/|xl/|ppt/|mimetypeapplication/vnd)|\xd0\xcf\x11\xe0"
            rb"|\{\\rtf",
            "an office document",
            SCREENSHOT,
        ),
        (
            rb"PK[\x03\x05]|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|\x1f\x8b|.{257}ustar",
            "an archive (ZIP or the like)",
            UNPACK,
        ),
        (rb"\0\x05\x16[\0\x07]", "macOS's extra data about a file", "choose the file without ._ before its name"),
        (rb"\0+\Z", "only zeros, because a copy or download failed", "fetch it again"),
        (rb"\s*[{\[]\s*[\"{}\[\]]", "JSON text", CHOOSE),
    )
]


def why_unreadable(data: bytes) -> str:
    """The sentence for somebody whose file could not be opened as a picture; empty if nobody knows what it is."""
    head = data[:HEAD]
    if OURS.match(head):
        return _unusual_jpeg(data) or DAMAGED
    with suppress(zlib.error):  # which most files raise
        inside = zlib.decompressobj(GZIP).decompress(data[: 16 * HEAD], HEAD)
        head = inside if b"<svg" in inside else head
    for pattern, what, advice in OTHERS:
        if pattern.match(head):
            return f"{NOT_READ}, but {what}: {advice}."
    return f"{NOT_READ}, but text: {CHOOSE}." if _is_text(head) else ""


def _unusual_jpeg(data: bytes) -> str:
    """What a JPEG has that decoders lack; empty if it has nothing unusual."""
    if not data.startswith(JPEG_START):
        return ""
    for _, marker, content in segments(data):
        if marker in FRAMES and len(content) > 2:
            bits, height = content[0], int.from_bytes(content[1:3])
            kinds = {
                "JPEG-LS compression": marker == 0xF7,
                "lossless compression": marker in (0xC3, 0xC7, 0xCB, 0xCF),
                "hierarchical compression": marker in (0xC5, 0xC6, 0xCD, 0xCE),
                f"{bits} bits per channel": bits != 8,
                "its height stored after its pixels (DNL)": not height,
                "arithmetic coding": marker in (0xC9, 0xCA),
            }
            return next((f"This JPEG has {kind}, which we do not read: {EXPORT}." for kind in kinds if kinds[kind]), "")
    return ""


def _is_text(head: bytes) -> bool:
    """Whether a file starts with at least one character of text and with nothing else."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = head.decode(encoding, "replace").rstrip("�")  # of a character that is cut off
    return bool(text) and all(character.isprintable() or character.isspace() for character in text.replace("�", "\0"))
