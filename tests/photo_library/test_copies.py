import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from photo_library.copies import NewFiles


def test_without_hard_links_copies_are_whole_and_overwrite_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on memory sticks and some networks."""

    def refused(_self: Path, _target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    like = tmp_path / "like"
    like.touch()
    os.utime(like, (1, 1))
    files = NewFiles()
    for content in (b"one", b"two", b"one"):
        files.save(tmp_path / "to" / "a.png", content, like=like)
    assert {p.name: p.read_bytes() for p in (tmp_path / "to").iterdir()} == {"a.png": b"one", "a_2.png": b"two"}
    assert (tmp_path / "to" / "a_2.png").stat().st_mtime == 1


def test_many_files_of_one_name_are_copied_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a first run and in one that finds all copies, the number of names looked up grows with that of the files."""
    number = 300
    looked = Counter[str]()
    lexists = os.path.lexists

    def counting(path: str | Path) -> bool:
        looked["names"] += 1
        return lexists(path)

    monkeypatch.setattr(os.path, "lexists", counting)
    for again in (False, True):
        looked.clear()
        files = NewFiles()
        contents = [b"%d" % (n % (number - 10)) for n in range(number)]  # ten of them twice
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(files.save, tmp_path / "image.jpg"), contents))
        assert {path.read_bytes() for path in tmp_path.iterdir()} == set(contents)
        assert len(list(tmp_path.iterdir())) == number - 10, again
        assert looked["names"] <= 2 * number


def test_a_copy_that_failed_leaves_its_name_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = NewFiles(), tmp_path / "a.png"
    files.save(path, b"one")
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            files.save(path, b"two")
    for content in (b"two", b"one", b"three"):
        files.save(path, content)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "a.png": b"one",
        "a_2.png": b"two",
        "a_3.png": b"three",
    }
