import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from photo_library import parse_tag, sidecars
from photo_library.sidecars import MAX_MEGABYTES, Sidecars, remove_tags, update_file
from photo_library.xmp import FIELDS, BadSidecar, XmpDocument

SHA256 = "0123456789abcdef" * 4
DARKTABLE = (Path(__file__).parent / "sidecars" / "darktable.xmp").read_bytes()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"pixels")
    return path


def write(picture: Path, verdict: str = "meme", sidecars: Sidecars | None = None) -> None:
    (sidecars or Sidecars()).write(picture, verdict, {"meme": 0.98, "not_meme": 0.02}.get(verdict, 0.5), SHA256)


def tags(sidecar: Path) -> list[str]:
    document = XmpDocument.parse(sidecar.read_bytes())
    return document.values(FIELDS[1].tag)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("style", "name"), [("extension", "cat.jpg.xmp"), ("lightroom", "cat.xmp")])
def test_a_sidecar_lies_where_libraries_look_for_it(style: str, name: str, picture: Path) -> None:
    write(picture, sidecars=Sidecars(style=style))
    assert names(picture.parent) == sorted(["cat.jpg", name])
    assert tags(picture.with_name(name)) == ["Meme Classifier/Meme"]
    assert picture.read_bytes() == b"pixels"
    assert remove_tags(picture) == 1
    assert names(picture.parent) == ["cat.jpg"]


@pytest.mark.parametrize(("style", "name", "other"), [("extension", "cat.jpg", "cat"), ("lightroom", "cat", "cat.jpg")])
@pytest.mark.parametrize("ending", [".xmp", ".XMP"])
def test_the_sidecar_that_is_there_is_merged_and_the_other_left_alone(
    style: str, name: str, other: str, ending: str, picture: Path
) -> None:
    sidecar, left_alone = picture.with_name(name + ending), picture.with_name(other + ending)
    for path in (sidecar, left_alone):
        path.write_bytes(DARKTABLE)
    write(picture, sidecars=Sidecars(style=style))
    assert names(picture.parent) == sorted(["cat.jpg", sidecar.name, left_alone.name])
    assert "Meme Classifier/Meme" in tags(sidecar)
    assert left_alone.read_bytes() == DARKTABLE
    assert remove_tags(picture) == 1
    assert sidecar.read_bytes() == left_alone.read_bytes() == DARKTABLE


def test_a_sidecar_in_small_letters_goes_before_one_in_capitals(picture: Path) -> None:
    small, capital = picture.with_name("cat.jpg.xmp"), picture.with_name("cat.jpg.XMP")
    capital.write_bytes(DARKTABLE)
    small.write_bytes(DARKTABLE)
    if small.samefile(capital):
        pytest.skip("this file system ignores case")
    write(picture)
    assert "Meme Classifier/Meme" in tags(small)
    assert capital.read_bytes() == DARKTABLE


def test_a_second_run_does_not_touch_the_file(picture: Path) -> None:
    write(picture)
    sidecar = picture.with_name("cat.jpg.xmp")
    os.utime(sidecar, (1, 1))
    before = (sidecar.read_bytes(), sidecar.stat().st_ino, sidecar.stat().st_mtime)
    write(picture)
    assert (sidecar.read_bytes(), sidecar.stat().st_ino, sidecar.stat().st_mtime) == before


def test_only_one_verdict_is_written_if_only_one_is_asked_for(picture: Path) -> None:
    only = Sidecars(only="meme")
    write(picture, "not_meme", only)
    assert names(picture.parent) == ["cat.jpg"]
    write(picture, "meme", only)
    assert tags(picture.with_name("cat.jpg.xmp")) == ["Meme Classifier/Meme"]
    write(picture, "not_sure", only)  # by another checkpoint
    assert names(picture.parent) == ["cat.jpg"]


def test_a_file_keeps_its_rights_and_a_link_stays_one(picture: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real.xmp"
    real.parent.mkdir()
    real.write_bytes(DARKTABLE)
    real.chmod(0o640)
    sidecar = picture.with_name("cat.jpg.xmp")
    sidecar.symlink_to(real)
    write(picture)
    assert sidecar.is_symlink()
    assert "Meme Classifier/Meme" in tags(real)
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert names(real.parent) == ["real.xmp"]


def test_read_only_sidecars_are_left_alone(picture: Path) -> None:
    sidecar = picture.with_name("cat.jpg.xmp")
    sidecar.write_bytes(DARKTABLE)
    sidecar.chmod(0o444)
    with pytest.raises(BadSidecar, match="read-only"):
        write(picture)
    assert sidecar.read_bytes() == DARKTABLE
    assert remove_tags(picture) == 0  # nothing to do is no error


def test_what_cannot_be_a_sidecar_is_refused(picture: Path, tmp_path: Path) -> None:
    sidecar = picture.with_name("cat.jpg.xmp")
    sidecar.symlink_to(tmp_path / "nothing")
    with pytest.raises(BadSidecar, match="a link to a file that does not exist"):
        write(picture)
    sidecar.unlink()
    sidecar.symlink_to(sidecar)
    with pytest.raises(OSError, match="symbolic links"):
        write(picture)
    sidecar.unlink()
    sidecar.mkdir()
    with pytest.raises(BadSidecar, match="is not a file"):
        write(picture)
    sidecar.rmdir()
    os.mkfifo(sidecar)  # reading it would never end
    with pytest.raises(BadSidecar, match="is not a file"):
        write(picture)
    sidecar.unlink()
    with sidecar.open("wb") as file:
        file.truncate(MAX_MEGABYTES * 1_000_000 + 1)
    with pytest.raises(BadSidecar, match="50 MB"):
        write(picture)
    sidecar.write_bytes(b"<x:xmpmeta>")
    with pytest.raises(BadSidecar, match="not well-formed"):
        remove_tags(picture)
    assert sidecar.read_bytes() == b"<x:xmpmeta>"
    assert names(tmp_path) == ["cat.jpg", "cat.jpg.xmp"]


def test_a_write_that_fails_leaves_the_old_file_alone(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = picture.with_name("cat.jpg.xmp")
    sidecar.write_bytes(DARKTABLE)

    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(picture)
    assert sidecar.read_bytes() == DARKTABLE
    assert names(picture.parent) == ["cat.jpg", "cat.jpg.xmp"]


def test_what_another_program_writes_meanwhile_is_merged(tmp_path: Path) -> None:
    path = tmp_path / "a"
    others = iter([b"their first", b"their second"])

    def change(data: bytes | None) -> bytes:
        if other := next(others, None):
            path.write_bytes(other)
        return (data or b"") + b" and ours"

    assert update_file(path, change)
    assert path.read_bytes() == b"their second and ours"
    assert names(tmp_path) == ["a"]


def test_a_file_that_never_rests_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "a"
    lengths = iter(range(1, 100))

    def change(data: bytes | None) -> bytes:
        path.write_bytes(b"x" * next(lengths))
        return (data or b"") + b" and ours"

    with pytest.raises(BadSidecar, match="is being changed by another program"):
        update_file(path, change)
    assert path.read_bytes() == b"x" * sidecars.ATTEMPTS


def test_two_pictures_with_one_sidecar_do_not_overwrite_each_other(picture: Path) -> None:
    lightroom = Sidecars(style="lightroom")
    other = picture.with_suffix(".png")
    other.write_bytes(b"pixels")
    write(picture, "meme", lightroom)
    with pytest.raises(BadSidecar, match=r"has the verdict of cat\.jpg"):
        write(other, "not_meme", lightroom)
    only_others = Sidecars(style="lightroom", only="not_sure")
    write(other, "not_meme", only_others)  # which removes nothing of the other picture's
    assert remove_tags(other) == 0
    assert tags(picture.with_suffix(".xmp")) == ["Meme Classifier/Meme"]
    picture.unlink()
    write(other, "not_meme", lightroom)
    assert tags(picture.with_suffix(".xmp")) == ["Meme Classifier/Not a meme"]


def test_threads_that_share_a_sidecar_write_one_after_the_other(tmp_path: Path) -> None:
    lightroom = Sidecars(style="lightroom")
    pictures = [tmp_path / f"cat.{number}" for number in range(16)]
    for path in pictures:
        path.touch()

    def written(path: Path) -> bool:
        try:
            write(path, "meme", lightroom)
        except BadSidecar:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(written, pictures)) == 1
    assert len(names(tmp_path)) == 17


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("Meme Classifier", ("Meme Classifier",)),
        (" Sorted | Fun ", ("Sorted", "Fun")),
        ("a/b", ("a", "b")),
        ("梗图", ("梗图",)),
    ],
)
def test_a_tag_may_have_levels(text: str, levels: tuple[str, ...]) -> None:
    assert parse_tag(text) == levels


@pytest.mark.parametrize("text", ["", " ", "|a", "a||b", "a/", "a\nb", "a\0b", "caf\udce9"])
def test_a_tag_that_is_no_keyword_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="needs a visible character"):
        parse_tag(text)
