"""Command-line options for photo libraries. They can be read without the packages that they need."""

import argparse
import os

from model import MEME, NOT_MEME, NOT_SURE
from photo_library import DEFAULT_TAG, STYLES, parse_tag
from tables import is_stream


def add_library_options(parser: argparse.ArgumentParser) -> None:
    """Add --xmp, --watch and what belongs to them."""
    library = parser.add_argument_group("for photo libraries (docs/photo-libraries.md, docs/watch.md)")
    library.add_argument(
        "--xmp", action="store_true", help="write the verdict as tags into an XMP sidecar beside each picture"
    )
    library.add_argument("--xmp-style", choices=STYLES, help="extension: cat.jpg.xmp (default); lightroom: cat.xmp")
    library.add_argument(
        "--xmp-tag", metavar="TAG", help=f"parent tag of Meme, Not a meme and Not sure (default: {DEFAULT_TAG})"
    )
    library.add_argument("--xmp-only", choices=(MEME, NOT_MEME, NOT_SURE), help="write tags for this verdict only")
    library.add_argument("--xmp-remove", action="store_true", help="remove the tags that --xmp wrote")
    library.add_argument(
        "--watch", action="store_true", help="keep running, and classify pictures as they appear in the folders"
    )


def check_library_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse options for photo libraries that exclude each other, and fill in the defaults."""
    options = {"--xmp": arguments.xmp, "--xmp-remove": arguments.xmp_remove, "--watch": arguments.watch}
    asked = [option for option, is_asked in options.items() if is_asked]
    if asked and arguments.engine == "ray":
        parser.error(f"{asked[0]} works on the machine that has the pictures; leave out --engine ray")
    writes = arguments.tables or arguments.copy_to or arguments.overlays
    if arguments.xmp_remove and (len(asked) > 1 or writes):
        parser.error("--xmp-remove removes tags and does nothing else; run the other options in a command of their own")
    for option in ("style", "tag", "only"):
        if getattr(arguments, f"xmp_{option}") is not None and not arguments.xmp:
            parser.error(f"--xmp-{option} says how to write sidecars; add --xmp")
    arguments.xmp_style = arguments.xmp_style or STYLES[0]
    try:
        arguments.xmp_tag = parse_tag(DEFAULT_TAG if arguments.xmp_tag is None else arguments.xmp_tag)
    except ValueError as error:
        parser.error(f"--xmp-tag: {error}")
    if arguments.watch:
        if "parquet" in arguments.tables:
            parser.error("a Parquet table cannot be read before its end; with --watch, use --csv or --json")
        if len(set(map(is_stream, arguments.tables.values()))) > 1:
            parser.error("with --watch, all tables are files, or there is one on standard output")
        for path in arguments.paths:
            if not os.path.isdir(path):  # noqa: PTH112  (Path.is_dir can raise)
                parser.error(f"--watch needs folders; {path} is none")
