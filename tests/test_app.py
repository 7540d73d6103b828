import csv
import dataclasses
import html
import json
import re
import tomllib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any
from zipfile import ZipFile

import pytest
import streamlit as st
from pictures import ROOT, encode, noise
from PIL import Image, ImageOps
from streamlit.testing.v1 import AppTest

import gallery
import gradcam
import sessions
from gallery import PER_PAGE
from images import MAX_MEGABYTES, open_picture
from model import NOT_SURE, BadCheckpoint, Classifier


@pytest.fixture
def page() -> AppTest:
    return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()


@pytest.fixture
def empty_caches() -> Iterator[None]:
    st.cache_data.clear()
    st.cache_resource.clear()
    yield
    st.cache_data.clear()
    st.cache_resource.clear()


def choose(page: AppTest, example: str) -> AppTest:
    return page.button(key=f"example-{example}").click().run()


def headers(page: AppTest) -> list[str]:
    return [header.value for header in page.header]


def evidence(page: AppTest) -> Any:
    """The choice of the class whose evidence is shown."""
    (control,) = [control for control in page.segmented_control if control.label == "Show the evidence"]
    return control


def texts(page: AppTest) -> str:
    return "\n".join([bar.proto.text for bar in page.get("progress")] + [caption.value for caption in page.caption])


def markdown(page: AppTest) -> str:
    return "\n".join(text.value for text in page.markdown)


def names(page: AppTest) -> list[str]:
    """Of the pictures on the page: the answer's, else those on the cards."""
    return [html.unescape(name) for text in page.get("html") for name in re.findall('title="(.*?)"', text.proto.body)]


def test_the_page_starts_without_an_answer(page: AppTest) -> None:
    assert not page.exception
    assert page.title[0].value == "Meme or not a meme?"
    assert "A meme** is a picture" in markdown(page)
    assert headers(page) == []
    assert len(page.get("image")) == 0


@pytest.mark.parametrize(
    ("example", "answer"), [("Cat meme", "Meme"), ("Mountains", "Not a meme"), ("Bar chart", "Not a meme")]
)
def test_an_example_is_answered_in_words_with_two_pictures(
    page: AppTest, example: str, answer: str, classifier: Classifier
) -> None:
    choose(page, example)
    assert not page.exception
    (header,) = headers(page)
    assert answer in re.split(r"[\[\]]", header)
    assert "Probability that this is a meme: " in texts(page)
    assert len(page.get("image")) == 3  # picture, heatmap, legend
    assert "red: strong" in texts(page)
    low, high = classifier.not_sure
    assert f"Up to {low:.0%}: not a meme · in between: not sure · from {high:.0%} on: meme." in texts(page)
    assert "misjudged" not in texts(page)
    assert names(page) == [f"Example: {example}"]


@pytest.mark.usefixtures("empty_caches")
def test_doubt_is_an_answer(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "load", lambda: dataclasses.replace(classifier, not_sure=(0.0, 1.0)))
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    choose(page, "Cat meme")
    assert headers(page) == [":gray[Not sure]"]
    assert "Often misjudged, so decide for yourself." in texts(page)


@pytest.mark.usefixtures("empty_caches")
def test_words_are_weaker_where_answers_are_often_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    half_right = [{"from": tenth / 10, "n": 9, "value": 0.5} for tenth in range(10)]
    measured = gallery.metrics() | {"calibration": half_right}
    monkeypatch.setattr(gallery, "metrics", lambda: measured)
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    choose(page, "Cat meme")
    assert "Probably a meme" in headers(page)[0]
    assert "Of 100 unseen pictures scored like this, 50 were memes." in texts(page)
    choose(page, "Mountains")
    assert "Probably not a meme" in headers(page)[0]


def test_one_example_is_a_doubtful_case(classifier: Classifier) -> None:
    examples = [open_picture(path) for path in (ROOT / "examples").glob("*.jpg")]
    assert NOT_SURE in {prediction.verdict for prediction in classifier.predict(examples)}


@pytest.fixture
def measured_strictness(classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A metrics file with thresholds such that one, none or all of mountains, cat and poster are memes."""
    pictures = [open_picture(ROOT / "examples" / f"{name}.jpg") for name in ("mountains", "concert_poster", "cat_meme")]
    mountains, poster, cat = (prediction.meme_probability for prediction in classifier.predict(pictures))
    strictness: dict[str, Any] = {
        key: {
            "threshold": threshold,
            "recall": {"value": recall, "low": recall - 0.02, "high": recall + 0.02},
            "precision": {"value": precision, "low": precision - 0.02, "high": precision + 0.02},
        }
        for key, threshold, recall, precision in (
            ("nearly_all", (mountains + poster) / 2, 0.97, 0.71),
            ("balanced", classifier.threshold, 0.9, 0.8),
            ("certain", (poster + cat) / 2, 0.72, 0.95),
        )
    }
    shipped = json.loads(gallery.METRICS.read_text())
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(shipped | {"strictness": strictness}))
    monkeypatch.setattr(gallery, "METRICS", path)
    gallery.metrics.cache_clear()
    yield strictness
    gallery.metrics.cache_clear()


def test_strictness_moves_the_verdict_and_the_marks(measured_strictness: Any, classifier: Classifier) -> None:
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    choose(page, "Concert poster")
    verdicts = []
    for strictness, found in measured_strictness.items():
        page.radio(key="strictness").set_value(strictness).run()
        assert not page.exception
        assert f"finds {found['recall']['value']:.0%} of memes, right on {found['precision']['value']:.0%}" in str(
            page.radio(key="strictness").proto
        )
        verdicts.append(headers(page)[0].rstrip("]").rpartition("[")[2])
        mark = found["threshold"] if strictness != gallery.BALANCED else classifier.not_sure[1]
        assert f"from {mark:.0%} on: meme." in texts(page)
    assert [verdict in ("Meme", "Probably a meme") for verdict in verdicts] == [True, False, False]


def test_strictness_moves_counts_filter_table_and_zip(
    measured_strictness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: dict[str, Any] = {}
    download_button = st.download_button

    def noted(label: str, make: Any, **named: Any) -> bool:
        downloads[label] = make
        return download_button(label, make, **named)

    monkeypatch.setattr(st, "download_button", noted)
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    examples = [f"{name}.jpg" for name in ("mountains", "concert_poster", "cat_meme")]
    add(page, [(name, (ROOT / "examples" / name).read_bytes()) for name in examples])
    for strictness, memes in (("nearly_all", examples[1:]), ("certain", examples[2:]), ("balanced", examples[2:])):
        assert strictness in measured_strictness
        page.radio(key="strictness").set_value(strictness).run()
        assert not page.exception
        assert f"Meme: {len(memes)} · " in markdown(page)
        assert f"Meme {len(memes)}" in page.pills(key="filter").options
        rows = list(csv.DictReader(downloads["Table (CSV)"]().splitlines()))
        assert [row["\ufeffpath"] for row in rows if row["verdict"] == row["final"] == "meme"] == memes
        with ZipFile(BytesIO(downloads["Only the memes (ZIP)"]())) as archive:
            assert [name.partition("_")[2] for name in archive.namelist()] == memes
        show(page, "Meme")
        assert names(page) == memes
        show(page, gallery.ALL)


def test_without_measurements_there_is_no_choice_of_strictness(measured_strictness: Any, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({key: value for key, value in gallery.metrics().items() if key != "strictness"}))
    gallery.metrics.cache_clear()
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    choose(page, "Mountains")
    assert not page.exception
    assert len(measured_strictness) == 3
    assert len(page.radio) == 0


def test_one_picture_is_corrected_and_the_correction_undone(page: AppTest) -> None:
    choose(page, "Cat meme")
    (before,) = headers(page)
    page.button(key="page-not_meme").click().run()
    assert "Not a meme" in headers(page)[0]
    assert "The classifier's verdict: Meme." in texts(page)
    page.button(key="page-undo").click().run()
    assert headers(page) == [before]


def test_the_strength_of_the_evidence_is_put_in_words(page: AppTest) -> None:
    choose(page, "Cat meme")
    assert "What speaks for a meme: strong" in str(page.get("image")[1].proto)
    evidence(page).select("not_meme").run()
    assert "What speaks against a meme: strong" not in str(page.get("image")[1].proto)


def test_an_upload_is_answered_and_replaces_the_example(page: AppTest) -> None:
    choose(page, "Cat meme")
    page.file_uploader[0].upload("holiday.jpg", encode(noise(600, 400), "JPEG")).run()
    assert not page.exception
    assert len(headers(page)) == 1
    assert page.session_state["example"] is None


def test_a_border_is_named_and_what_was_judged_outlined(page: AppTest) -> None:
    cat = Image.open(ROOT / "examples" / "cat_meme.jpg")
    framed = ImageOps.expand(cat, (0, cat.height // 2, 0, 0), "black")
    for picture, sentence in ((cat, ""), (framed, "Judged without the plain border at the top: ")):
        page.file_uploader[0].set_value([("cat.png", encode(picture), "image/png")]).run()
        assert not page.exception
        assert "Meme" in headers(page)[0]
        assert sentence in texts(page)
        assert bool(sentence) == ("plain border" in texts(page))


def test_choices_only_redraw(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(page, "Cat meme")
    before = texts(page)

    def forward(*_arguments: object) -> None:
        raise AssertionError("classified again")

    monkeypatch.setattr(gradcam, "forward_with_feature_map", forward)
    painted = page.get("image")[1].proto.imgs[0].url
    page.slider(key="page-opacity").set_value(20).run()
    assert not page.exception
    assert texts(page) == before
    assert page.get("image")[1].proto.imgs[0].url != painted
    evidence(page).select("not_meme").run()
    assert not page.exception
    assert "What speaks against a meme" in str(page.get("image")[1].proto)


@pytest.mark.parametrize("method", ["Grad-CAM++", "HiResCAM", "LayerCAM", "Occlusion"])
def test_another_method_paints_another_heatmap_of_the_same_answer(page: AppTest, method: str) -> None:
    choose(page, "Cat meme")
    before, painted = texts(page), page.get("image")[1].proto.imgs[0].url
    page.selectbox(key="page-method").select(method).run()
    assert not page.exception
    assert texts(page) == before
    assert page.get("image")[1].proto.imgs[0].url != painted


def test_another_colour_map_brings_its_own_legend(page: AppTest) -> None:
    choose(page, "Cat meme")
    assert "red: strong" in texts(page)
    page.segmented_control(key="page-colours").select("viridis").run()
    assert not page.exception
    assert "yellow: strong" in texts(page)
    assert "red: strong" not in texts(page)


@pytest.mark.parametrize(("example", "words"), [("Cat meme", "meme"), ("Mountains", "not a meme")])
def test_the_heatmap_is_put_to_the_test_in_words(page: AppTest, example: str, words: str) -> None:
    choose(page, example)
    page.toggle(key="page-test").set_value(True).run()
    assert not page.exception
    (sentence,) = [text.value for text in page.markdown if re.match("Holds|Partly|Does not hold", text.value)]
    (figures,) = [text.value for text in page.markdown if text.value.startswith("Without the strongest")]
    (before, after), *others = re.findall(r"(\d+)% → (\d+)%", figures)
    assert figures.startswith(f"Without the strongest 20% of the heatmap (blurred): {words} **{before}% → {after}%**")
    assert f"{before}% → {after}%" in sentence
    assert len(others) == 2
    assert {other[0] for other in others} == {before}
    assert f"Probability that this is a meme: {before if words == 'meme' else 100 - int(before)}%" in texts(page)
    assert "without the strongest 20%" in str(page.get("image")[0].proto)


def test_each_picture_starts_with_the_evidence_for_its_own_answer(page: AppTest) -> None:
    for example, other in (("Cat meme", "not_meme"), ("Choice meme", "not_meme"), ("Mountains", "meme")):
        choose(page, example)
        expected = "What speaks against a meme" if other == "meme" else "What speaks for a meme"
        assert expected in str(page.get("image")[1].proto)
        evidence(page).select(other).run()
        assert expected not in str(page.get("image")[1].proto)


def test_a_visit_does_not_grow_with_its_pictures(page: AppTest) -> None:
    """Streamlit remembers each widget by its identity until the visit ends."""
    seen = set()
    for example in ("Cat meme", "Mountains", "Bar chart"):
        choose(page, example)
        controls = [*page.segmented_control, *page.selectbox, *page.slider, *page.toggle]
        seen.add(tuple(control.proto.id for control in controls))
    ((first, *others),) = seen
    assert first
    assert len(others) == 4


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "bad.png is empty."),
        (b"GIF89a", "damaged or incomplete|not a picture"),
        (encode(noise(300, 300))[:2000], "bad.png is damaged or incomplete and cannot be opened."),
        (encode(noise(10, 300)), "each side needs at least 16"),
    ],
)
def test_a_bad_file_gets_its_sentence_and_the_page_stays_usable(page: AppTest, data: bytes, sentence: str) -> None:
    page.file_uploader[0].upload("bad.png", data).run()
    assert not page.exception
    (error,) = page.error
    assert any(part in error.value for part in sentence.split("|"))
    assert headers(page) == []
    choose(page, "Mountains")
    assert len(page.error) == 0
    assert len(headers(page)) == 1


def add(page: AppTest, uploads: list[tuple[str, bytes]]) -> AppTest:
    page.file_uploader[0].set_value([(name, data, "image/png") for name, data in uploads]).run()
    assert not page.exception
    return page


def show(page: AppTest, words: str) -> None:
    page.pills(key="filter").select(words).run()
    assert not page.exception


def test_several_pictures_become_a_gallery(page: AppTest) -> None:
    examples = [(f"{name}.jpg", (ROOT / "examples" / f"{name}.jpg").read_bytes()) for name in ("cat_meme", "mountains")]
    add(page, [*examples, ("**bold** <b>../../x.png", b"nothing")])
    assert names(page) == ["cat_meme.jpg", "mountains.jpg", "**bold** <b>../../x.png"]
    assert headers(page) == []
    assert "Meme: 1 · Not a meme: 1 · Not sure: 0 · Cannot be read: 1" in markdown(page)
    cards = "\n".join(text.proto.body for text in page.get("html"))
    assert "This file is not a picture in a format we read" in cards
    assert [option for option in page.pills(key="filter").options if "1" in option] == [
        "Meme 1",
        "Not a meme 1",
        "Cannot be read 1",
    ]
    for words, expected in (
        ("Not a meme", ["mountains.jpg"]),
        ("Cannot be read", ["**bold** <b>../../x.png"]),
        ("Not sure", []),
    ):
        show(page, words)
        assert names(page) == expected


def test_the_review_steps_through_the_pictures_and_corrects_them(page: AppTest) -> None:
    examples = [(f"{name}.jpg", (ROOT / "examples" / f"{name}.jpg").read_bytes()) for name in ("cat_meme", "mountains")]
    add(page, [*examples, ("x.png", b"nothing")])
    page.button(key="open-1").click().run()
    assert "Meme" in headers(page)[0]
    page.button(key="dialog-not_meme").click().run()
    assert "Not a meme" in headers(page)[0]
    assert "Meme: 0 · Not a meme: 2 · Not sure: 0 · Cannot be read: 1" in markdown(page)
    (following,) = [button for button in page.button if button.label == "Next"]
    following.click().run()
    assert names(page)[-1] == "mountains.jpg"
    page.button(key="dialog-undo").click().run()  # of the first picture, which is shown again
    assert names(page)[-1] == "cat_meme.jpg"
    assert "Meme: 1 · Not a meme: 1" in markdown(page)
    page.button(key="remove").click().run()
    assert not page.exception
    assert names(page)[:2] == ["mountains.jpg", "x.png"]
    assert "Meme: 0 · Not a meme: 1 · Not sure: 0 · Cannot be read: 1" in markdown(page)


def test_pictures_and_a_folder_add_up_in_the_order_in_which_they_came(page: AppTest) -> None:
    folder = [(f"f/{seed}.png", encode(noise(60, 60, seed)), "image/png") for seed in (3, 1, 2)]
    page.file_uploader[1].set_value(folder).run()
    assert names(page) == ["f/1.png", "f/2.png", "f/3.png"]
    page.file_uploader[0].upload("one.png", encode(noise(60, 60))).run()
    assert not page.exception
    assert names(page) == ["f/1.png", "f/2.png", "f/3.png", "one.png"]
    page.file_uploader[1].set_value(folder[:1]).run()
    assert names(page) == ["one.png", "f/3.png"]


def test_an_example_stays_when_an_upload_is_taken_away(page: AppTest) -> None:
    page.file_uploader[1].set_value([("f/1.png", encode(noise(60, 60)), "image/png")]).run()
    page.file_uploader[0].upload("2.png", encode(noise(60, 60, 2))).run()
    choose(page, "Cat meme")
    page.file_uploader[1].clear().run()
    assert not page.exception
    assert page.session_state["example"] == "Cat meme"
    page.file_uploader[1].set_value([("f/1.png", encode(noise(60, 60)), "image/png")]).run()
    assert page.session_state["example"] is None


def test_remove_all_starts_anew(page: AppTest) -> None:
    add(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(3)])
    (button,) = [button for button in page.button if button.label == "Remove all"]
    button.click().run()
    assert not page.exception
    assert names(page) == []
    assert page.session_state["items"] == {}
    add(page, [("one.png", encode(noise(60, 60)))])
    assert names(page) == ["one.png"]


def test_the_gallery_shows_page_after_page_in_the_chosen_order(page: AppTest) -> None:
    add(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(PER_PAGE + 3)])
    assert names(page) == [f"{seed}.png" for seed in range(PER_PAGE)]
    page.selectbox[-1].select("least like a meme first").run()
    first = names(page)
    assert len(first) == PER_PAGE
    pagination: Any = next(iter(page.get("pagination")))
    pagination.set_value(2).run()
    assert sorted(first + names(page)) == sorted(f"{seed}.png" for seed in range(PER_PAGE + 3))
    page.selectbox[-1].select("most like a meme first").run()
    assert len(names(page)) == PER_PAGE  # of the first page again


def test_a_correction_that_empties_the_last_page_leads_to_the_one_before(page: AppTest) -> None:
    add(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(PER_PAGE + 1)])
    show(page, "Not a meme")
    pagination: Any = next(iter(page.get("pagination")))
    pagination.set_value(2).run()
    assert names(page) == [f"{PER_PAGE}.png"]
    page.session_state["corrections"][page.session_state["order"][-1]] = "meme"
    page.run()
    assert not page.exception
    assert names(page) == [f"{seed}.png" for seed in range(PER_PAGE)]


def test_originals_beyond_the_limit_go_and_their_answers_stay(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [encode(noise(60, 60, seed)) for seed in range(3)]
    monkeypatch.setattr(gallery, "MAX_TOTAL_MEGABYTES", (len(pictures[1]) + len(pictures[2])) / 1e6)
    add(page, [(f"{seed}.png", data) for seed, data in enumerate(pictures)])
    page.run()
    assert not page.exception
    assert names(page) == ["0.png", "1.png", "2.png"]
    assert "The ZIPs lack the 1 oldest pictures, which made room; the table has all 3." in texts(page)
    page.button(key="open-1").click().run()
    assert not page.exception
    assert "The original had to make room for newer pictures." in texts(page)
    assert "Probability that this is a meme" in texts(page)


def test_one_picture_is_no_gallery(page: AppTest) -> None:
    add(page, [("one.png", encode(noise(60, 60)))])
    assert "Cannot be read: " not in markdown(page)
    assert len(headers(page)) == 1


def test_the_model_card_can_be_read(page: AppTest) -> None:
    page.query_params["page"] = "model-card"
    page.run()
    assert not page.exception
    assert page.markdown[0].value.startswith("# ")
    assert "](docs/" not in page.markdown[0].value


@pytest.mark.usefixtures("empty_caches")
def test_a_missing_checkpoint_gets_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise BadCheckpoint("There is no checkpoint.")

    monkeypatch.setattr(Classifier, "load", load)
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    choose(page, "Mountains")
    assert [error.value for error in page.error] == ["There is no checkpoint."]
    add(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(2)])
    assert [error.value for error in page.error] == ["There is no checkpoint."]


class Impatient(Event):
    """Fails where others would wait for ever."""

    def wait(self, timeout: float | None = 20) -> bool:
        assert super().wait(timeout), "waited in vain"
        return True


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sessions.pictures_at_once", lambda: 1)
    monkeypatch.setattr(sessions, "Event", Impatient)
    sessions.core_semaphore.cache_clear()
    yield
    sessions.core_semaphore.cache_clear()


@pytest.mark.usefixtures("one_core")
def test_a_picture_that_fell_out_of_the_cache_does_not_lock_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=30).run()
    choose(page, "Cat meme")
    toggle = st.toggle

    def forgetful(*given: Any, **named: Any) -> bool:
        st.cache_data.clear()  # as others' pictures would
        return toggle(*given, **named)

    monkeypatch.setattr(st, "toggle", forgetful)
    page.toggle(key="page-test").set_value(True).run()
    assert not page.exception
    assert "Without the strongest" in markdown(page)


def test_an_animation_says_that_one_frame_was_judged(page: AppTest) -> None:
    frames = [noise(80, 80, seed) for seed in range(3)]
    page.file_uploader[0].upload("moving.gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).run()
    assert "Only the first frame of this animation was classified." in texts(page)


def test_a_picture_with_a_missing_part_says_so(page: AppTest) -> None:
    data = encode(noise(300, 300), "JPEG", quality=95)
    page.file_uploader[0].upload("cut.jpg", data[: len(data) * 98 // 100]).run()
    assert "of this picture is missing, because its file ends early." in texts(page)
    assert len(headers(page)) == 1


def test_the_server_limits_what_the_page_promises() -> None:
    settings = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert settings["server"]["maxUploadSize"] == MAX_MEGABYTES
