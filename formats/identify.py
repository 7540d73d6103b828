"""Say what a file is that cannot be opened as a picture, and what to do about it."""

import re
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from contextlib import suppress

from formats.jpeg import FRAMES, JPEG_START, segments

DAMAGED = "This picture is damaged or incomplete and cannot be opened."
NOT_READ = "This file is not a picture in a format we read"

HEAD = 4096  # bytes at a file's start that tell what it is
LONG_HEAD = 65_536  # bytes in which the first element of a text in XML may come
UTF_16 = (BOM_UTF16_LE, BOM_UTF16_BE)
GZIP = 31  # zlib's `wbits` for it

# Formats of images.FORMATS: a file that starts like one is damaged if it cannot be opened. Sequences of HEIC are no
# pictures to us if they lack a still one, whose description is in a box named meta (ISO 14496-12).
OURS = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|RIFF....WEBP"
    rb"|.{4}ftyp(avif|avis|hei[cmsx]|mif1|(hev[cmsx]|msf1).*meta)",
    re.DOTALL,
)

EXPORT = "export it as JPEG or PNG"
SCREENSHOT = "take a screenshot of the part that matters"
STILL = "take a screenshot of the moment that matters"
UNPACK = "unpack it and choose the pictures in it"
CHOOSE = "choose a picture"

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

# By what to do, and by what such a file is, a pattern of its first bytes. The first that matches counts.
KINDS = {
    EXPORT: {
        "a JPEG XL picture": rb"\xff\x0a|\0\0\0\x0cJXL ",
        "a JPEG 2000 picture": rb"\0\0\0\x0cjP|\xff\x4f\xff\x51",
        "a JPEG XR picture": rb"II\xbc",
        "a camera's RAW file (Canon CR2, CR3 or CRW)": rb"II\*\0....CR|.{4}ftypcrx |II\x1a\0\0\0HEAP",
        "a camera's RAW file (Fujifilm RAF)": rb"FUJIFILMCCD-RAW",
        "a camera's RAW file (Olympus ORF)": rb"IIR[OS]|MMOR",
        "a camera's RAW file (Panasonic RW2)": rb"IIU\0",
        "a camera's RAW file": rb"FOVb|\0MRM",
        "a camera's RAW file (DNG, NEF, ARW or the like)": TIFF + rb".*" + RAW_TAGS,
        "a TIFF picture or a camera's RAW file": TIFF + rb".*" + CAMERAS,
        "a TIFF picture": rb"II[*+]\0|MM\0[*+]",
        "a Photoshop file (PSD or PSB)": rb"8BPS",
        "a GIMP file (XCF)": rb"gimp xcf",
        "an icon": rb"\0\0[\x01\x02]\0[^\0]\0|icns",
        "a Targa picture (TGA)": rb"\0\0[\x02\x03\x0a\x0b]\0\0\0\0\0",
        "a Netpbm picture (PPM, PGM or PBM)": rb"P[1-7]\s",
        "a picture of a rare kind": (
            rb"qoif|#\?R|DDS |SIMPLE  =|BPG\xfb|FLIF|AT&TFORM|\x0a[\0-\x05]\x01[\x01\x02\x04\x08]"
            rb"|\x76\x2f\x31\x01|[\x8a\x8b][MJ]NG|.{128}DICM|\xd7\xcd\xc6\x9a"
        ),
        "a PostScript drawing (EPS)": rb"\s*%!PS|\xc5\xd0\xd3\xc6",
    },
    SCREENSHOT: {
        "a PDF document": rb".{0,1000}%PDF-",
        "an office document": (
            rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|docProps/|word/|xl/|ppt/|mimetypeapplication/vnd)"
            rb"|\xd0\xcf\x11\xe0|\{\\rtf"
        ),
    },
    STILL: {
        "an animation in HEIC": rb".{4}ftyp(hev[cmsx]|msf1)",
        "a video (QuickTime MOV)": rb".{4}ftypqt|\0.{3}(moov|wide|free|skip|pnot)|.{4}mdat",
        "a video (MP4)": rb".{4}ftyp(?!M4A )",
        "a video (WebM)": rb"\x1a\x45\xdf\xa3.{0,60}webm",
        "a video (Matroska MKV)": rb"\x1a\x45\xdf\xa3",
        "a video (AVI)": rb"RIFF....AVI ",
        "a video": (
            rb"FLV\x01|\0\0\x01[\xb3\xba]|\x30\x26\xb2\x75|OggS.{20,60}theora"
            rb"|(.{4})?G.{187}(.{4})?G.{187}(.{4})?G"  # MPEG transport stream
        ),
    },
    UNPACK: {
        "an archive (ZIP or the like)": (
            rb"PK[\x03\x05]|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|\x1f\x8b|.{257}ustar"
        )
    },
    CHOOSE: {
        "a sound recording": rb".{4}ftypM4A |ID3|\xff[\xf2\xf3\xfb]|fLaC|OggS|RIFF....WAVE",
        "JSON text": rb"\s*[{\[]\s*[\"{}\[\]]",
    },
    "choose the file without ._ before its name": {"macOS's extra data about a file": rb"\0\x05\x16[\0\x07]"},
    "fetch it again": {"only zeros, because a copy or download failed": rb"\0+\Z"},
}
OTHERS = [
    (re.compile(pattern, re.DOTALL), f"{what}: {advice}")
    for advice, kinds in KINDS.items()
    for what, pattern in kinds.items()
]
# What may come before the first element in XML or HTML, and its name.
PROLOGUE = re.compile(rb"\s+|<\?.*?\?>|<!--.*?-->|<!doctype [^>\[]*(\[.*?\]\s*)?>", re.DOTALL | re.IGNORECASE)
ELEMENT = re.compile(rb"<(?:[\w.-]+:)?(svg|html|head|body|title|meta|script)\b", re.IGNORECASE)


def why_unreadable(data: bytes) -> str:
    """The sentence for somebody whose file could not be opened as a picture; empty if nobody knows what it is."""
    head = data[:HEAD]
    if OURS.match(head):
        return _unusual_jpeg(data) or DAMAGED
    markup = _first_element(data[:LONG_HEAD])
    what = {"svg": f"an SVG drawing: {EXPORT}", "": ""}.get(markup, f"a web page (HTML): {CHOOSE}")
    what = what or next((what for pattern, what in OTHERS if pattern.match(head)), "")
    what = what or (f"text: {CHOOSE}" if _is_text(head) else "")
    return what and f"{NOT_READ}, but {what}."


def _first_element(text: bytes) -> str:
    """The name of the first element of an SVG drawing or a web page, which may be compressed; empty for other files."""
    with suppress(zlib.error):  # which most files raise
        text = zlib.decompressobj(GZIP).decompress(text, LONG_HEAD)
    text = text.decode("utf-16", "replace").encode() if text.startswith(UTF_16) else text.removeprefix(BOM_UTF8)
    at = 0
    while found := PROLOGUE.match(text, at):  # piece by piece: one pattern for all could try exponentially many splits
        at = found.end()
    element = ELEMENT.match(text, at)
    return element[1].decode().lower() if element else ""


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
    encoding = "utf-16" if head.startswith(UTF_16) else "utf-8"
    text = head.decode(encoding, "replace").rstrip("�")  # of a character that is cut off
    return bool(text) and all(character.isprintable() or character.isspace() for character in text.replace("�", "\0"))
