import os
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from commands import run
from pictures import encode, noise
from PIL import Image, ImageDraw

from evaluation.dataset import read_folder
from training import collect
from training.collect import difference_hash, read_picture, render_page
from training.synthesize import SAVED_SIDE

needs_programs = pytest.mark.skipif(
    not (os.environ.get("CI") or (shutil.which("dpkg-deb") and shutil.which("pdftoppm"))),
    reason="dpkg-deb and pdftoppm, from Debian's dpkg and poppler-utils, are not installed",
)


def pdf(*pages: Image.Image) -> bytes:
    buffer = BytesIO()
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:])
    return buffer.getvalue()


def test_icons_strips_and_damaged_files_are_left_out() -> None:
    assert read_picture(encode(noise(100, 400))) is None
    assert read_picture(encode(noise(160, 600))) is None
    assert read_picture(b"no picture") is None
    picture = read_picture(encode(noise(300, 200)))
    assert picture is not None
    assert picture.size == (300, 200)


def test_near_copies_look_alike_and_others_do_not() -> None:
    picture = noise(300, 200)
    assert difference_hash(picture) == difference_hash(picture.resize((250, 170)))
    assert difference_hash(picture) != difference_hash(noise(300, 200, 1))


@needs_programs
def test_an_empty_page_and_a_broken_pdf_are_left_out() -> None:
    sheet = Image.new("RGB", (400, 300), "white")
    assert render_page("empty.pdf", pdf(sheet)) is None
    assert render_page("broken.pdf", b"%PDF-1.4 and no more") is None
    ImageDraw.Draw(sheet).rectangle((50, 50, 200, 200), "black")
    page = render_page("full.pdf", pdf(sheet))
    assert page is not None
    assert max(page.size) == 2 * SAVED_SIDE


@needs_programs
def test_the_command_takes_pages_and_pictures_out_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    control = "Package: some-doc\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    (root / "DEBIAN" / "control").write_text(control)
    (root / "usr").mkdir()
    (root / "usr" / "manual.pdf").write_bytes(pdf(noise(400, 500), noise(400, 500, 1)))
    (root / "usr" / "screen.png").write_bytes(encode(noise(500, 300, 2)))
    (root / "usr" / "copy.png").write_bytes(encode(noise(500, 300, 2)))
    (root / "usr" / "icon.png").write_bytes(encode(noise(64, 64, 3)) + bytes(5000))
    package = tmp_path / "some-doc_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", root, package], check=True, capture_output=True)
    assert run(monkeypatch, collect.main, None, package, "--out", tmp_path / "data") == 0
    assert "some-doc: 2 pictures" in capsys.readouterr().out
    found = read_folder(tmp_path / "data")
    assert sorted((p.label, p.group, p.source) for p in found) == [
        ("not_meme", "document", "debian-some-doc"),
        ("not_meme", "screenshot", "debian-some-doc"),
    ]
    assert all(max(Image.open(p.path).size) == 264 for p in found)


@needs_programs
def test_what_is_no_package_gets_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "some.deb").write_text("no package")
    with pytest.raises(SystemExit, match=r"some\.deb cannot be unpacked"):
        collect.read_package(tmp_path / "some.deb")


def test_missing_programs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, collect.main, None, "a.deb", "--out", tmp_path)
    assert stop.value.code == 2
    assert "dpkg-deb, pdfinfo, pdftoppm must be installed" in capsys.readouterr().err
