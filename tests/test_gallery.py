from contextlib import closing, nullcontext
from io import BytesIO
from threading import Barrier, Event, Timer
from zipfile import ZipFile

import pytest
from pictures import encode, noise
from PIL import Image

from gallery import (
    MAX_PICTURES,
    MAX_TOTAL_MEGABYTES,
    THUMBNAIL_SIDE,
    Item,
    classify_upload,
    count_within_limits,
    final_verdicts,
    map_on_free_cores,
    overlays,
    safe_name,
    sort_items,
    sorted_zip,
    table,
)
from gradcam import explain, overlay
from images import BadImage, open_picture
from model import MEME, NOT_MEME, NOT_SURE, Classifier, Prediction
from sessions import FairSemaphore


def item(name: str, probability: float, verdict: str) -> Item:
    return Item(name, Prediction(MEME if probability >= 0.5 else NOT_MEME, probability, verdict), b"")


ALL = [MEME, NOT_MEME, NOT_SURE, None]
ITEMS = {
    "a": item("a", 0.9, MEME),
    "b": item("b", 0.1, NOT_MEME),
    "c": Item("c", BadImage("This file is empty."), None),
    "d": item("d", 0.55, NOT_SURE),
    "e": item("e", 0.99, MEME),
}


def test_looking_gives_the_answer_and_a_small_picture(tiny_classifier: Classifier) -> None:
    picture = noise(900, 500)
    seen = classify_upload(tiny_classifier, "x.png", encode(picture))
    assert seen.answer == tiny_classifier.predict([picture])[0]
    with Image.open(BytesIO(seen.thumbnail or b"")) as thumbnail:
        assert max(thumbnail.size) == THUMBNAIL_SIDE
    bad = classify_upload(tiny_classifier, "x.png", b"")
    assert (str(bad.answer), bad.thumbnail) == ("This file is empty.", None)


def test_pictures_are_looked_at_by_all_cores_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gallery.usable_cores", lambda: 3)
    all_here = Barrier(3)

    def wait(number: int) -> int:
        all_here.wait(20)  # raises where fewer than three work at once
        return -number

    assert list(map_on_free_cores(wait, range(6), nullcontext())) == [0, -1, -2, -3, -4, -5]


def test_no_more_are_open_than_cores_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gallery.usable_cores", lambda: 3)
    free = FairSemaphore(1)

    def is_alone(_: int) -> bool:
        return not free.acquire(blocking=False)

    assert all(map_on_free_cores(is_alone, range(9), free))
    assert free.acquire(blocking=False)


def test_what_has_not_begun_when_the_visitor_leaves_is_never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gallery.usable_cores", lambda: 2)
    begun: list[int] = []
    has_left = Event()

    def begin(number: int) -> None:
        begun.append(number)
        assert number == 0 or has_left.wait(20)

    with closing(
        map_on_free_cores(begin, range(9), FairSemaphore(1))
    ) as results:  # so one of two threads waits for the core
        next(results)
        Timer(2, has_left.set).start()  # by then, the rest is given up; closing waits for what has begun
    assert begun == [0, 1]


@pytest.mark.parametrize(
    ("verdicts", "order", "expected"),
    [
        (ALL, None, "abcde"),
        ([MEME], None, "ae"),
        ([NOT_SURE], None, "d"),
        ([None], None, "c"),
        ([NOT_MEME, NOT_SURE], None, "bd"),
        (ALL, "most like a meme first", "eadbc"),
        (ALL, "least like a meme first", "bdaec"),
        (ALL, "most doubtful first", "dabec"),
        ([MEME], "most like a meme first", "ea"),
    ],
)
def test_the_gallery_is_filtered_and_sorted(
    verdicts: list[str | None], order: str | None, expected: str, tiny_classifier: Classifier
) -> None:
    assert "".join(sort_items(ITEMS, {}, tiny_classifier, verdicts, order)) == expected


def test_a_corrected_picture_counts_as_what_the_visitor_says(tiny_classifier: Classifier) -> None:
    corrections = {"b": MEME, "d": NOT_MEME, "c": MEME}
    assert final_verdicts(ITEMS, corrections) == {"a": MEME, "b": MEME, "c": None, "d": NOT_MEME, "e": MEME}
    assert sort_items(ITEMS, corrections, tiny_classifier, [MEME], None) == ["a", "b", "e"]


def test_limits_are_by_number_and_by_size() -> None:
    assert count_within_limits([]) == 0
    assert count_within_limits([1] * (MAX_PICTURES + 5)) == MAX_PICTURES
    assert count_within_limits([9_000_000] * 20) == MAX_TOTAL_MEGABYTES // 9
    assert count_within_limits([MAX_TOTAL_MEGABYTES * 1_000_000, 1]) == 1


def test_the_table_has_every_picture_and_the_corrections(tiny_classifier: Classifier) -> None:
    lines = table(ITEMS, {"b": MEME}, tiny_classifier).splitlines()
    assert lines[0] == "\ufeffpath,label,meme_probability,verdict,error,checkpoint,correction"
    assert lines[1] == "a,meme,0.9,meme,,,"
    assert lines[2] == "b,not_meme,0.1,not_meme,,,meme"
    assert lines[3] == "c,,,,This file is empty.,,"
    assert len(lines) == 6


def test_pictures_are_sorted_into_folders_and_corrections_win() -> None:
    archive = ZipFile(BytesIO(sorted_zip(((key, key.encode()) for key in ITEMS), ITEMS, {"d": NOT_MEME})))
    assert {name: archive.read(name) for name in archive.namelist()} == {
        "meme/0001_a": b"a",
        "not_meme/0002_b": b"b",
        "not_meme/0004_d": b"d",
        "meme/0005_e": b"e",
    }


def test_the_same_pictures_make_the_same_zip_that_can_be_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> bytes:
        return sorted_zip(((key, key.encode()) for key in ITEMS), ITEMS, {})

    before = made()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert made() == before
    assert {member.external_attr >> 16 for member in ZipFile(BytesIO(before)).infolist()} == {0o644}


def test_overlays_are_of_each_pictures_own_answer(tiny_classifier: Classifier) -> None:
    uploads = {"a": encode(noise(80, 60)), "b": b"", "c": encode(noise(50, 90, 1))}
    items = {key: classify_upload(tiny_classifier, f"{key}.png", data) for key, data in uploads.items()}
    archive = ZipFile(BytesIO(overlays(uploads.items(), items, tiny_classifier, nullcontext())))
    assert archive.namelist() == ["0001_a.png.png", "0003_c.png.png"]
    (explanation,) = explain(tiny_classifier, [noise(50, 90, 1)])
    expected = overlay(noise(50, 90, 1), explanation.heat[explanation.prediction.label])
    assert open_picture(archive.read("0003_c.png.png")).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("holiday.jpg", "holiday.jpg"),
        ("photos/2024/a b.jpg", "a_b.jpg"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\x.png", "x.png"),
        ("<b>x</b>.png", "b_.png"),
        ("猫.png", "猫.png"),
        (".bashrc", "bashrc"),
        ("..", "picture"),
        ("", "picture"),
        ("a\u202egnp.exe", "a_gnp.exe"),
        ("CON:aux\x00.png", "CON_aux_.png"),
    ],
)
def test_names_in_a_zip_are_harmless(name: str, expected: str) -> None:
    assert safe_name(name) == expected


def test_endless_names_are_cut() -> None:
    assert len(safe_name("x" * 5000 + "." + "y" * 5000)) < 100
    assert len(safe_name("𝓯" * 5000 + "." + "y" * 5000).encode()) < 220  # file systems count bytes
