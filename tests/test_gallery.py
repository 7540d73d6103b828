import re
from contextlib import closing, nullcontext
from io import BytesIO
from threading import Barrier, Event, Timer
from zipfile import ZipFile

import pytest
from pictures import encode, noise
from PIL import Image

from gallery import (
    MAX_TOTAL_MEGABYTES,
    THUMBNAIL_SIDE,
    Item,
    card_html,
    classify_upload,
    edges,
    error_sentence,
    escape_markdown,
    final_verdicts,
    in_one_sentence,
    keys_over_budget,
    map_on_free_cores,
    metrics,
    notes,
    overlays,
    safe_name,
    share_of_memes,
    sort_items,
    sorted_zip,
    table,
    verdict_in_words,
    with_strictness,
    worth_in_words,
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


def test_the_oldest_originals_go_first() -> None:
    limit = MAX_TOTAL_MEGABYTES * 1_000_000
    assert keys_over_budget({}) == []
    assert keys_over_budget({"a": limit}) == []
    assert keys_over_budget({"a": 1, "b": limit - 1, "c": 2}) == ["a", "b"]
    assert keys_over_budget({str(n): 9_000_000 for n in range(20)}) == [str(n) for n in range(20 - limit // 9_000_000)]


def test_the_share_of_memes_is_that_of_the_same_tenth() -> None:
    for tenth in metrics()["calibration"]:
        assert share_of_memes(tenth["from"] + 0.05) == tenth["value"]
    assert share_of_memes(1.0) == metrics()["calibration"][-1]["value"]


def test_words_say_probably_where_fewer_than_four_in_five_were_right() -> None:
    for tenth in metrics()["calibration"]:
        probability = tenth["from"] + 0.05
        assert (verdict_in_words(MEME, probability) == "Meme") == (tenth["value"] >= 0.8)
        assert (verdict_in_words(NOT_MEME, probability) == "Not a meme") == (tenth["value"] <= 0.2)
        assert verdict_in_words(NOT_SURE, probability) == "Not sure"


@pytest.mark.parametrize(
    ("strictness", "probability", "expected"),
    [
        ("nearly_all", 0.29, NOT_MEME),
        ("nearly_all", 0.31, MEME),
        ("certain", 0.4, NOT_MEME),
        ("certain", 0.41, NOT_SURE),
        ("certain", 0.89, NOT_SURE),
        ("certain", 0.9, MEME),
        ("balanced", 0.31, "as it was"),
    ],
)
def test_strictness_moves_the_threshold(
    strictness: str, probability: float, expected: str, tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    thresholds = {"nearly_all": {"threshold": 0.3}, "certain": {"threshold": 0.9}}
    monkeypatch.setattr("gallery.metrics", lambda: {"strictness": thresholds})
    judged = with_strictness(Prediction(NOT_MEME, probability, "as it was"), strictness, tiny_classifier)
    assert judged.verdict == expected
    low, high = edges(strictness, tiny_classifier)
    if strictness != "balanced":
        assert (expected == MEME) == (probability >= high)
        assert (expected == NOT_MEME) == (probability <= low and probability < high)


@pytest.mark.parametrize(
    ("name", "error", "expected"),
    [
        ("holiday.pdf", "This file is not a picture.", "holiday.pdf is not a picture."),
        ("a\\1.jpg", "This picture is damaged.", "a\\1.jpg is damaged."),
        ("x.png", "There is no such file.", "x.png: There is no such file."),
    ],
)
def test_an_error_names_its_file(name: str, error: str, expected: str) -> None:
    assert error_sentence(name, BadImage(error)) == expected


def test_names_are_never_markup() -> None:
    assert escape_markdown("*a* <b> $x$ :red[y]\n# z") == r"\*a\* \<b\> \$x\$ \:red\[y\] \# z"
    assert escape_markdown("1. x.png") == r"1\. x.png"
    shown = card_html(Item('<b>"x"&.png', BadImage("This file is empty."), None), None)
    assert "<b>" not in shown
    assert "&lt;b&gt;&quot;x&quot;&amp;.png" in shown


def test_the_table_has_every_picture_and_the_corrections(tiny_classifier: Classifier) -> None:
    lines = table(ITEMS, {"b": MEME}, tiny_classifier).splitlines()
    assert lines[0] == "\ufeffpath,label,meme_probability,verdict,error,checkpoint,correction,final,warning"
    assert lines[1] == "a,meme,0.9,meme,,,,meme,"
    assert lines[2] == "b,not_meme,0.1,not_meme,,,meme,meme,"
    assert lines[3] == "c,,,,This file is empty.,,,,"
    assert len(lines) == 6


def test_a_picture_of_which_a_part_is_missing_says_so(tiny_classifier: Classifier) -> None:
    whole = encode(noise(300, 300), "JPEG", quality=95)
    cut = whole[: len(whole) * 98 // 100]
    (sentence,) = notes(open_picture(cut), None)
    assert re.fullmatch(r"The last \d% of this picture is missing, because its file ends early\.", sentence)
    incomplete = classify_upload(tiny_classifier, "x.jpg", cut)
    assert f'title="{sentence}">Note' in card_html(incomplete, None)
    assert table({"x": incomplete}, {}, tiny_classifier).endswith(f',"{sentence}"\r\n')
    assert list(notes(open_picture(whole), None)) == []
    assert ">Note<" not in card_html(classify_upload(tiny_classifier, "x.jpg", whole), None)


@pytest.mark.parametrize(
    ("blank", "sentence"),
    [
        (0, "Only the first frame of this animation was classified."),
        (2, "Frame 3 of this animation was classified, because those before it show only one colour."),
    ],
)
@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_an_animation_names_the_frame_that_was_judged(file_format: str, blank: int, sentence: str) -> None:
    frames = [Image.new("RGB", (80, 80), (90 * n, 90, 90)) for n in range(blank)] + [noise(80, 80, n) for n in (1, 2)]
    moving = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert list(notes(open_picture(moving), None)) == [sentence]
    assert list(notes(open_picture(encode(frames[-1])), None)) == []


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.006, "1 was a meme"), (0.0, "0 were memes"), (0.02, "2 were memes"), (1.0, "100 were memes")],
)
def test_one_meme_is_singular(share: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gallery.share_of_memes", lambda _: share)
    assert worth_in_words(0.5) == f"Of 100 unseen pictures scored like this, {words}."


def test_a_screen_reader_is_told_each_answer() -> None:
    spoken = [in_one_sentence(ITEMS[key], correction) for key, correction in (("a", None), ("b", MEME), ("c", None))]
    assert spoken == ["a: Meme, probability of a meme 90%", "b: Meme, your verdict", "c is empty."]


def test_pictures_are_sorted_into_folders_and_corrections_win() -> None:
    archive = ZipFile(BytesIO(sorted_zip(((key, key.encode()) for key in ITEMS), ITEMS, {"d": NOT_MEME})))
    assert {name: archive.read(name) for name in archive.namelist()} == {
        "meme/0001_a": b"a",
        "not_meme/0002_b": b"b",
        "not_meme/0004_d": b"d",
        "meme/0005_e": b"e",
    }
    memes = ZipFile(BytesIO(sorted_zip(((key, key.encode()) for key in "ade"), ITEMS, {"d": MEME}, (MEME,))))
    assert memes.namelist() == ["meme/0001_a", "meme/0004_d", "meme/0005_e"]


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
