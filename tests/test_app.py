import re

import pytest
import streamlit as st
from pictures import ROOT, encode, noise
from streamlit.testing.v1 import AppTest

import gradcam
from images import MAX_MEGABYTES
from model import BadCheckpoint, Classifier


@pytest.fixture
def page() -> AppTest:
    return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()


def headers(page: AppTest) -> list[str]:
    return [header.value for header in page.header]


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
def test_an_example_is_answered_in_words_with_two_pictures(page: AppTest, example: str, answer: str) -> None:
    page.pills(key="example").select(example).run()
    assert not page.exception
    (header,) = headers(page)
    assert answer in re.split(r"[\[\]]", header)
    assert "Probability that this is a meme: " in texts(page)
    assert len(page.get("image")) == 3  # picture, heatmap, legend
    assert "red: strong" in texts(page)


def test_an_upload_is_answered_and_replaces_the_example(page: AppTest) -> None:
    page.pills(key="example").select("Cat meme").run()
    page.file_uploader[0].upload("holiday.jpg", encode(noise(600, 400), "JPEG")).run()
    assert not page.exception
    assert len(headers(page)) == 1
    assert page.pills(key="example").value is None


def test_choices_only_redraw(page: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    page.pills(key="example").select("Cat meme").run()
    before = texts(page)

    def forward(*_arguments: object) -> None:
        raise AssertionError("classified again")

    monkeypatch.setattr(gradcam, "forward_with_feature_map", forward)
    painted = page.get("image")[1].proto.imgs[0].url
    page.slider[0].set_value(20).run()
    assert not page.exception
    assert texts(page) == before
    assert page.get("image")[1].proto.imgs[0].url != painted
    page.segmented_control[0].select("not_meme").run()
    assert not page.exception
    assert "Evidence against a meme" in str(page.get("image")[1].proto)


def test_each_picture_starts_with_the_evidence_for_its_own_answer(page: AppTest) -> None:
    for example, other in (("Cat meme", "not_meme"), ("Choice meme", "not_meme"), ("Mountains", "meme")):
        page.pills(key="example").select(example).run()
        expected = "Evidence against a meme" if other == "meme" else "Evidence for a meme"
        assert expected in str(page.get("image")[1].proto)
        page.segmented_control[0].select(other).run()
        assert expected not in str(page.get("image")[1].proto)


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


def test_a_missing_checkpoint_gets_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise BadCheckpoint("There is no checkpoint.")

    monkeypatch.setattr(Classifier, "load", load)
    st.cache_data.clear()
    st.cache_resource.clear()
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    page.pills(key="example").select("Mountains").run()
    assert [error.value for error in page.error] == ["There is no checkpoint."]


def test_an_animation_says_that_one_frame_was_judged(page: AppTest) -> None:
    frames = [noise(80, 80, seed) for seed in range(3)]
    page.file_uploader[0].upload("moving.gif", encode(frames[0], "GIF", save_all=True, append_images=frames[1:])).run()
    assert "its first frame was judged" in texts(page)


def test_the_server_limits_what_the_page_promises() -> None:
    assert f"maxUploadSize = {MAX_MEGABYTES}" in (ROOT / ".streamlit" / "config.toml").read_text()
