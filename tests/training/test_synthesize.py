import random
from pathlib import Path

import numpy as np
import pytest
from commands import run
from pictures import noise
from PIL import Image, ImageFont

from evaluation.dataset import read_folder
from training import synthesize
from training.synthesize import (
    ANY,
    DECLARATION,
    PLAIN,
    WORLD,
    Artist,
    Letters,
    can_write,
    fonts,
    read_captions,
    read_texts,
    wrap,
)

TEXTS = ["When you have written a test for everything and it still fails", "Кто рано встаёт, тому Бог подаёт"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of pictures to draw on."""
    folder = tmp_path / "base"
    folder.mkdir()
    for seed in range(4):
        noise(120, 90 + 30 * seed, seed).save(folder / f"{seed}.png")
    return folder


def artist(base: Path, seed: int = 0) -> Artist:
    return Artist(random.Random(seed), sorted(base.iterdir()), [], TEXTS)


KINDS = sorted(
    (label, name) for label in ("memes", "others") for name in getattr(Artist(random.Random(), [], [], []), label)
)


@pytest.mark.parametrize(("label", "name"), KINDS)
def test_every_kind_gives_pictures_that_differ(label: str, name: str, base: Path) -> None:
    drawn = [getattr(artist(base, seed), label)[name][1]() for seed in range(3)]
    for picture in drawn:
        assert picture.mode == "RGB"
        assert min(picture.size) >= 60
        assert np.asarray(picture).std() > 3  # not a blank sheet
    assert len({picture.tobytes() for picture in drawn}) == 3


def test_text_stays_in_its_box(base: Path) -> None:
    page = Image.new("RGB", (400, 300), "white")
    artist(base).write(page, TEXTS[0], (0.25, 0.5, 0.75, 0.7), Letters(largest=0.5))
    ink = np.asarray(page.convert("L")) < 128  # (300, 400)
    assert ink[150:210, 100:300].sum() > 200
    ink[150:210, 100:300] = False
    assert not ink.any()


@pytest.mark.parametrize(("name", "expected"), [("macro", 1), ("labels", 2), ("caption-bar", 1), ("panels", 0)])
def test_where_text_stands_upon_a_whole_page_is_known(name: str, expected: int, base: Path) -> None:
    drawing = artist(base, 3)
    page = drawing.memes[name][1]()
    boxes = [box for written, box in drawing.written if written is page]
    assert len(boxes) >= expected
    assert len(boxes) == 0 or expected > 0
    for left, top, right, bottom in boxes:
        box = left * page.width, top * page.height, right * page.width, bottom * page.height
        ink = np.asarray(page.crop(box).convert("L"))
        assert ink.std() > 20  # letters and ground


def test_a_font_is_found_that_has_the_letters(base: Path) -> None:
    font = artist(base).font(PLAIN, TEXTS[1])
    assert can_write(font, "ё")
    assert not can_write(font, "\ue123")
    for text in DECLARATION:
        letters = "".join(filter(str.isalpha, text))[:2]
        if any(can_write(font, letters) for font in fonts(WORLD)):  # where the system has the script
            assert can_write(artist(base).font(PLAIN, text), letters)


def test_lines_are_no_wider_than_asked() -> None:
    font = ImageFont.truetype(fonts(ANY)[0], 20)
    for text in (TEXTS[0], "無" * 40, "one\ntwo"):
        lines = wrap(text, font, 150)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
        assert all(font.getlength(line) <= 150 or " " not in line for line in lines)
    assert wrap("one\ntwo", font, 150) == ["one", "two"]


def test_texts_are_sentences_without_their_authors(tmp_path: Path) -> None:
    fortunes = tmp_path / "fortunes"
    fortunes.write_text(f"{TEXTS[0]}\n\t-- Somebody\n%\n  |__/\\__|  ======  ######  \n%\nshort\n%\n{TEXTS[1]}\n%\n")
    index = tmp_path / "fortunes.dat"
    index.write_bytes(b"\x00\xff\xfe")
    assert read_texts([fortunes, index]) == TEXTS


def test_the_command_draws_labelled_folders_that_repeat(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "fortunes").write_text("\n%\n".join(TEXTS))
    (base / "broken.png").write_bytes(b"no picture")
    for out in ("first", "second"):
        arguments = ("--texts", texts, "--out", tmp_path / out, "--memes", "4", "--others", "6")
        assert run(monkeypatch, synthesize.main, None, base, *arguments) == 0
    assert "broken.png: This file is not a picture" in capsys.readouterr().err
    first, second = read_folder(tmp_path / "first"), read_folder(tmp_path / "second")
    assert [p.label for p in first] == ["meme"] * 4 + ["not_meme"] * 6
    assert {p.source for p in first} == {"drawn"}
    assert [p.path.read_bytes() for p in first] == [p.path.read_bytes() for p in second]
    assert all(max(Image.open(p.path).size) == 264 for p in first)
    captions = read_captions(tmp_path / "first")
    assert set(captions) <= {p.path for p in first[:4]}
    assert all(
        0 <= left < right <= 1 and 0 <= top < bottom <= 1
        for boxes in captions.values()
        for left, top, right, bottom in boxes
    )
    assert read_captions(base) == {}


def test_without_words_nothing_is_drawn(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, synthesize.main, None, base, "--texts", tmp_path, "--out", tmp_path / "out")
    assert stop.value.code == 2
