import dataclasses
import re
import tomllib
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest
import streamlit as st
from pictures import ROOT, encode, noise
from PIL import Image, ImageOps
from streamlit.testing.v1 import AppTest

import gradcam
import sessions
from gallery import MAX_PICTURES
from images import MAX_MEGABYTES
from model import BadCheckpoint, Classifier


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


def headers(page: AppTest) -> list[str]:
    return [header.value for header in page.header]


def evidence(page: AppTest) -> Any:
    """The choice of the class whose evidence is shown."""
    (control,) = [control for control in page.segmented_control if control.label == "Show the evidence"]
    return control


def texts(page: AppTest) -> str:
    return "\n".join([bar.proto.text for bar in page.get("progress")] + [caption.value for caption in page.caption])


def test_the_page_starts_without_an_answer(page: AppTest) -> None:
    assert not page.exception
    assert page.title[0].value == "Meme or not a meme?"
    assert headers(page) == []
    assert len(page.get("image")) == 0


@pytest.mark.parametrize(
    ("example", "answer"), [("Cat meme", "Meme"), ("Mountains", "Not a meme"), ("Bar chart", "Not a meme")]
)
def test_an_example_is_answered_in_words_with_two_pictures(
    page: AppTest, example: str, answer: str, classifier: Classifier
) -> None:
    page.pills(key="example").select(example).run()
    assert not page.exception
    (header,) = headers(page)
    assert answer in re.split(r"[\[\]]", header)
    assert "Probability that this is a meme: " in texts(page)
    assert len(page.get("image")) == 3  # picture, heatmap, legend
    assert "red: strong" in texts(page)
    low, high = classifier.not_sure
    assert f"Up to {low:.0%}: not a meme · in between: not sure · from {high:.0%} on: meme." in texts(page)
    assert "often misjudged" not in texts(page)


@pytest.mark.usefixtures("empty_caches")
def test_doubt_is_an_answer(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Classifier, "load", lambda: dataclasses.replace(classifier, not_sure=(0.0, 1.0)))
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    page.pills(key="example").select("Cat meme").run()
    assert headers(page) == ["Not sure"]
    assert "Pictures with a probability like this one are often misjudged" in texts(page)


def test_the_strength_of_the_evidence_is_put_in_words(page: AppTest) -> None:
    page.pills(key="example").select("Cat meme").run()
    assert "Evidence for a meme: strong" in str(page.get("image")[1].proto)
    evidence(page).select("not_meme").run()
    assert "Evidence against a meme: strong" not in str(page.get("image")[1].proto)


def test_an_upload_is_answered_and_replaces_the_example(page: AppTest) -> None:
    page.pills(key="example").select("Cat meme").run()
    page.file_uploader[0].upload("holiday.jpg", encode(noise(600, 400), "JPEG")).run()
    assert not page.exception
    assert len(headers(page)) == 1
    assert page.pills(key="example").value is None


def test_who_sends_a_framed_picture_reads_that_its_bars_do_not_count(page: AppTest) -> None:
    cat = Image.open(ROOT / "examples" / "cat_meme.jpg")
    page.file_uploader[0].upload("cat.png", encode(cat)).run()
    alone, (answer,) = texts(page), headers(page)
    assert "without the plain bars" not in alone
    page.file_uploader[0].upload("screen.png", encode(ImageOps.expand(cat, (0, cat.height // 2), "black"))).run()
    assert not page.exception
    assert headers(page) == [answer]
    assert texts(page).replace("It was judged without the plain bars at its edge.\n", "") == alone


def test_choices_only_redraw(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    page.pills(key="example").select("Cat meme").run()
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
    assert "Evidence against a meme" in str(page.get("image")[1].proto)


@pytest.mark.parametrize("method", ["Grad-CAM++", "HiResCAM", "LayerCAM", "Occlusion"])
def test_another_method_paints_another_heatmap_of_the_same_answer(page: AppTest, method: str) -> None:
    page.pills(key="example").select("Cat meme").run()
    before, painted = texts(page), page.get("image")[1].proto.imgs[0].url
    page.selectbox(key="page-method").select(method).run()
    assert not page.exception
    assert texts(page) == before
    assert page.get("image")[1].proto.imgs[0].url != painted


def test_another_colour_map_brings_its_own_legend(page: AppTest) -> None:
    page.pills(key="example").select("Cat meme").run()
    assert "red: strong" in texts(page)
    page.segmented_control(key="page-colours").select("viridis").run()
    assert not page.exception
    assert "yellow: strong" in texts(page)
    assert "red" not in texts(page)


@pytest.mark.parametrize(("example", "words"), [("Cat meme", "meme"), ("Mountains", "not a meme")])
def test_the_heatmap_is_put_to_the_test_in_words(page: AppTest, example: str, words: str) -> None:
    page.pills(key="example").select(example).run()
    assert len(page.markdown) == 1
    page.toggle(key="page-test").set_value(True).run()
    assert not page.exception
    sentence = page.markdown[-1].value
    (before, after), *others = re.findall(r"(\d+)% → (\d+)%", sentence)
    assert sentence.startswith(f"Without the strongest 20% of the heatmap (blurred): {words} **{before}% → {after}%**")
    assert len(others) == 2
    assert {other[0] for other in others} == {before}
    assert f"Probability that this is a meme: {before if words == 'meme' else 100 - int(before)}%" in texts(page)
    assert "without the strongest 20%" in str(page.get("image")[0].proto)


def test_each_picture_starts_with_the_evidence_for_its_own_answer(page: AppTest) -> None:
    for example, other in (("Cat meme", "not_meme"), ("Choice meme", "not_meme"), ("Mountains", "meme")):
        page.pills(key="example").select(example).run()
        expected = "Evidence against a meme" if other == "meme" else "Evidence for a meme"
        assert expected in str(page.get("image")[1].proto)
        evidence(page).select(other).run()
        assert expected not in str(page.get("image")[1].proto)


def test_a_visit_does_not_grow_with_its_pictures(page: AppTest) -> None:
    """Streamlit remembers each widget by its identity until the visit ends."""
    seen = set()
    for example in ("Cat meme", "Mountains", "Bar chart"):
        page.pills(key="example").select(example).run()
        controls = [*page.segmented_control, *page.selectbox, *page.slider, *page.toggle]
        seen.add(tuple(control.proto.id for control in controls))
    ((first, *others),) = seen
    assert first
    assert len(others) == 4


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "This file is empty."),
        (b"GIF89a", "damaged or incomplete|not a picture"),
        (encode(noise(300, 300))[:2000], "This picture is damaged or incomplete"),
        (encode(noise(10, 300)), "each side needs at least 16"),
    ],
)
def test_a_bad_file_gets_its_sentence_and_the_page_stays_usable(page: AppTest, data: bytes, sentence: str) -> None:
    page.file_uploader[0].upload("bad.png", data).run()
    assert not page.exception
    (error,) = page.error
    assert any(part in error.value for part in sentence.split("|"))
    assert headers(page) == []
    page.pills(key="example").select("Mountains").run()
    assert len(page.error) == 0
    assert len(headers(page)) == 1


def gallery(page: AppTest, uploads: list[tuple[str, bytes]]) -> AppTest:
    page.file_uploader[0].set_value([(name, data, "image/png") for name, data in uploads]).run()
    assert not page.exception
    return page


def names(page: AppTest) -> list[str]:
    """Of the gallery's pictures; the first text is the name above the answer."""
    return [text.value for text in page.text][1:]


def test_several_pictures_become_a_gallery(page: AppTest) -> None:
    examples = [(f"{name}.jpg", (ROOT / "examples" / f"{name}.jpg").read_bytes()) for name in ("cat_meme", "mountains")]
    gallery(page, [*examples, ("**bold** <b>../../x.png", b"nothing")])
    assert names(page) == ["cat_meme.jpg", "mountains.jpg", "**bold** <b>../../x.png"]
    assert "Meme: 1 · Not a meme: 1 · Not sure: 0 · Cannot be read: 1" in [text.value for text in page.markdown]
    captions = [caption.value for caption in page.caption]
    assert any(re.fullmatch(r"Meme, \d+%", caption) for caption in captions)
    assert any(re.fullmatch(r"Not a meme, \d+%", caption) for caption in captions)
    assert any(caption.startswith("This file is not a picture in a format we read") for caption in captions)
    (control,) = [control for control in page.pills if control.label == "Show"]
    control.select("Not a meme").run()
    assert names(page) == ["mountains.jpg"]
    control.select("Cannot be read").run()
    assert names(page) == ["**bold** <b>../../x.png"]
    control.select("Not sure").run()
    assert names(page) == []
    control.select("All").run()
    assert len(names(page)) == 3


def test_pictures_and_a_folder_add_up_in_the_order_in_which_they_came(page: AppTest) -> None:
    folder = [(f"f/{seed}.png", encode(noise(60, 60, seed)), "image/png") for seed in (3, 1, 2)]
    page.file_uploader[1].set_value(folder).run()
    assert names(page) == ["f/1.png", "f/2.png", "f/3.png"]
    page.file_uploader[0].upload("one.png", encode(noise(60, 60))).run()
    assert not page.exception
    assert names(page) == ["f/1.png", "f/2.png", "f/3.png", "one.png"]
    assert page.text[0].value == "one.png"  # the large answer is that of the newest one
    page.file_uploader[1].set_value(folder[:1]).run()
    assert names(page) == ["one.png", "f/3.png"]
    assert page.text[0].value == "f/3.png"


def test_an_example_stays_when_an_upload_is_taken_away(page: AppTest) -> None:
    page.file_uploader[1].set_value([("f/1.png", encode(noise(60, 60)), "image/png")]).run()
    page.file_uploader[0].upload("2.png", encode(noise(60, 60, 2))).run()
    page.pills(key="example").select("Cat meme").run()
    page.file_uploader[1].clear().run()
    assert not page.exception
    assert page.pills(key="example").value == "Cat meme"
    page.file_uploader[1].set_value([("f/1.png", encode(noise(60, 60)), "image/png")]).run()
    assert page.pills(key="example").value is None


def test_the_gallery_shows_page_after_page_in_the_chosen_order(page: AppTest) -> None:
    gallery(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(23)])
    assert names(page) == [f"{seed}.png" for seed in range(20)]
    page.selectbox[-1].select("least like a meme first").run()
    first = names(page)
    assert len(first) == 20
    pagination: Any = next(iter(page.get("pagination")))
    pagination.set_value(2).run()
    assert sorted(first + names(page)) == sorted(f"{seed}.png" for seed in range(23))
    page.selectbox[-1].select("most like a meme first").run()
    assert len(names(page)) == 20  # of the first page again


def test_a_correction_that_empties_the_last_page_leads_to_the_one_before(page: AppTest) -> None:
    gallery(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(41)])
    assert "Not a meme: 41" in page.markdown[-1].value
    (control,) = [control for control in page.pills if control.label == "Show"]
    control.select("Not a meme").run()
    pagination: Any = next(iter(page.get("pagination")))
    pagination.set_value(3).run()
    assert names(page) == ["40.png"]
    page.session_state["corrections"][page.session_state["came"][-1]] = "meme"
    page.run()
    assert not page.exception
    assert names(page) == [f"{seed}.png" for seed in range(20, 40)]


def test_one_picture_is_no_gallery(page: AppTest) -> None:
    gallery(page, [("one.png", encode(noise(60, 60)))])
    assert "All pictures" not in [subheader.value for subheader in page.subheader]
    assert len(headers(page)) == 1


def test_past_the_limit_the_page_says_so(page: AppTest) -> None:
    gallery(page, [(f"{seed}.png", b"nothing") for seed in range(MAX_PICTURES + 3)])
    assert [warning.value for warning in page.warning] == [
        "Only the first 100 of these 103 pictures are looked at; that is the limit."
    ]
    assert "Cannot be read: 100" in page.markdown[-1].value


@pytest.mark.usefixtures("empty_caches")
def test_a_missing_checkpoint_gets_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise BadCheckpoint("There is no checkpoint.")

    monkeypatch.setattr(Classifier, "load", load)
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    page.pills(key="example").select("Mountains").run()
    assert [error.value for error in page.error] == ["There is no checkpoint."]
    gallery(page, [(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(2)])
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
    page.pills(key="example").select("Cat meme").run()
    toggle = st.toggle

    def forgetful(*given: Any, **named: Any) -> bool:
        st.cache_data.clear()  # as others' pictures would
        return toggle(*given, **named)

    monkeypatch.setattr(st, "toggle", forgetful)
    page.toggle(key="page-test").set_value(True).run()
    assert not page.exception
    assert page.markdown[-1].value.startswith("Without the strongest")


def test_an_animation_says_that_one_frame_was_judged(page: AppTest) -> None:
    frames = [noise(80, 80, seed) for seed in range(3)]
    page.file_uploader[0].upload("moving.gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).run()
    assert "its first frame was judged" in texts(page)


def test_the_server_limits_what_the_page_promises() -> None:
    settings = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert settings["server"]["maxUploadSize"] == MAX_MEGABYTES
