"""Take pictures that are no memes out of Debian packages: python -m training.collect PACKAGE.deb... --out DATA_DIR

Documentation is full of what is rare in collections of photographs: printed pages, slides, screenshots,
diagrams. Of each PDF one page is rendered (by `pdftoppm`, Debian's package poppler-utils); pictures are
taken as they are. `apt-get download PACKAGE` gets a package.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageFilter

from images import SUFFIXES, BadImage, open_picture
from model import NOT_MEME
from training.synthesize import QUALITY, SAVED_SIDE

OF_EACH_PACKAGE = 150  # pictures at most, for they look alike
OF_EACH_COLLECTION = 750  # of TeX Live's packages, which document hundreds of programs each
PDFS_OF_A_FOLDER = 3  # at most: those of one folder look alike
SMALLEST_SIDE = 150  # pixels; smaller ones are icons
LARGEST_RATIO = 3.2
BYTES = range(4_000, 30_000_000)
SEED = 0
TOOLS = ("dpkg-deb", "pdfinfo", "pdftoppm")


def read_package(package: Path) -> list[tuple[str, bytes]]:
    """Names and contents of the PDFs and pictures in a package, in a seeded order."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:  # noqa: S603
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                files = [
                    (member.name, content.read())
                    for member in archive
                    if member.size in BYTES
                    and Path(member.name).suffix[1:].lower() in (*SUFFIXES, "pdf")
                    and (content := archive.extractfile(member)) is not None
                ]
        except tarfile.TarError as error:
            raise SystemExit(f"{package} cannot be unpacked: {error}") from error
    random.Random(SEED).shuffle(files)
    return files


def pictures_of(files: list[tuple[str, bytes]]) -> Iterator[tuple[str, Image.Image]]:
    """Group and picture of each file that shows something."""
    pdfs_seen: dict[Path, int] = {}
    seen = set()
    for name, content in files:
        if name.lower().endswith(".pdf"):
            folder = Path(name).parent
            pdfs_seen[folder] = pdfs_seen.get(folder, 0) + 1
            picture = render_page(name, content) if pdfs_seen[folder] <= PDFS_OF_A_FOLDER else None
            group = "document"
        else:
            picture, group = read_picture(content), "screenshot"
        if picture is not None and (look := difference_hash(picture)) not in seen:
            seen.add(look)
            yield group, picture


def render_page(name: str, pdf: bytes) -> Image.Image | None:
    """One page of a PDF, more often than by chance the first; None if it is empty or cannot be read."""
    try:
        info = subprocess.run(["pdfinfo", "-"], input=pdf, capture_output=True, timeout=20, check=True).stdout  # noqa: S607
        pages = int(re.findall(rb"Pages:\s+(\d+)", info)[0])
        draw = random.Random(f"{SEED}-{name}")
        page = "1" if draw.random() < 0.25 else str(draw.randint(1, pages))
        command = ["pdftoppm", "-png", "-scale-to", str(2 * SAVED_SIDE), "-f", page, "-l", page]
        png = subprocess.run(command, input=pdf, capture_output=True, timeout=40, check=True).stdout  # noqa: S603
        picture = open_picture(png)
    except (subprocess.SubprocessError, ValueError, IndexError):  # ValueError: no pages, or a bad picture
        return None
    low, high = picture.convert("L").filter(ImageFilter.BoxBlur(4)).getextrema()
    return picture if high - low > 25 else None  # type: ignore[operator]


def read_picture(content: bytes) -> Image.Image | None:
    """A picture; None if it is damaged, an icon or a strip."""
    try:
        picture = open_picture(content)
    except BadImage:
        return None
    large = min(picture.size) >= SMALLEST_SIDE and max(picture.size) >= SAVED_SIDE
    return picture if large and max(picture.size) <= LARGEST_RATIO * min(picture.size) else None


def difference_hash(picture: Image.Image) -> bytes:
    """Whether each cell of a small grid is brighter than its right neighbour: equal for near copies."""
    grey = picture.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    rows = [grey.crop((0, y, 9, y + 1)).tobytes() for y in range(8)]
    return bytes(row[x] > row[x + 1] for row in rows for x in range(8))


def main() -> int:
    """Read the command line and collect; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Take pictures that are no memes out of Debian packages.")
    parser.add_argument("packages", type=Path, nargs="+", help=".deb files")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="data folder, gets not_meme/")
    arguments = parser.parse_args()
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        parser.error(f"{', '.join(missing)} must be installed: Debian's packages dpkg and poppler-utils")
    for package in arguments.packages:
        source, count = package.name.partition("_")[0], 0
        limit = OF_EACH_COLLECTION if source.startswith("texlive") else OF_EACH_PACKAGE
        for group, picture in pictures_of(read_package(package)):
            picture.thumbnail((SAVED_SIDE, SAVED_SIDE), Image.Resampling.LANCZOS)
            folder = arguments.out / NOT_MEME / f"{group}__debian-{source}"
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{count:04}.webp", quality=QUALITY)
            count += 1
            if count >= limit:
                break
        print(f"{source}: {count} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
