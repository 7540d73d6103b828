"""The HTTP API as a client sees it, mostly without a network."""

import asyncio
import base64
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from io import BytesIO
from typing import Any

import pytest
import schemathesis
import torch
from httpx2 import ASGITransport, AsyncClient, Client, Response
from hypothesis import HealthCheck, settings
from pictures import ROOT, encode, noise
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.applications import Starlette
from starlette.testclient import TestClient

import serve
from benchmarks.load import Visitor
from benchmarks.page import running_server
from gradcam import explain, overlay
from images import open_picture
from model import BadCheckpoint, Classifier
from sessions import UPLOAD_PATH, UploadLimitMiddleware, pictures_at_once

MEME = (ROOT / "examples" / "cat_meme.jpg").read_bytes()


@pytest.fixture
def client() -> TestClient:
    return TestClient(Starlette(routes=list(serve.routes)))


def pictures(*uploads: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("pictures", upload) for upload in uploads]


def test_the_api_gives_the_answers_of_the_classifier(client: TestClient, classifier: Classifier) -> None:
    name = '../a "b" <i>.png'
    response = client.post("/api/classify", files=pictures(("cat.jpg", MEME), (name, encode(noise(90, 60)))))
    assert response.status_code == 200
    body = response.json()
    assert body["checkpoint"] == classifier.sha256
    expected = classifier.predict([open_picture(MEME), noise(90, 60)])
    assert [row["meme_probability"] for row in body["pictures"]] == [round(p.meme_probability, 4) for p in expected]
    assert [row["verdict"] for row in body["pictures"]] == [prediction.verdict for prediction in expected]
    assert body["pictures"][0]["name"] == "cat.jpg"
    assert all(set(row) == {"name", "label", "meme_probability", "verdict", "warning"} for row in body["pictures"])
    assert [row["warning"] for row in body["pictures"]] == [None, None]


def test_a_warning_stands_beside_the_answer(client: TestClient) -> None:
    (row,) = client.post("/api/classify", files=pictures(("cat.jpg", MEME[: -len(MEME) // 200]))).json()["pictures"]
    assert row["warning"] == "The last 2% of this picture is missing, because its file ends early."
    assert row["label"] == "meme"


def test_overlays_on_request(client: TestClient, classifier: Classifier) -> None:
    response = client.post("/api/classify?overlays=true", files=pictures(("cat.jpg", MEME)))
    (row,) = response.json()["pictures"]
    picture = open_picture(MEME)
    torch.set_num_threads(1)  # as in the server; the number of threads changes rounding
    (explanation,) = explain(classifier, [picture])
    picture.thumbnail((800, 800))
    with Image.open(BytesIO(base64.b64decode(row["overlay_png"]))) as heatmap:
        assert heatmap.tobytes() == overlay(picture, explanation.heat[row["label"]]).tobytes()
        assert heatmap.info["Checkpoint SHA-256"] == classifier.sha256


def test_a_bad_picture_does_not_stop_the_others(client: TestClient) -> None:
    response = client.post("/api/classify", files=pictures(("bad.jpg", MEME[:3000]), ("cat.jpg", MEME)))
    assert response.status_code == 200
    bad, good = response.json()["pictures"]
    assert bad == {"name": "bad.jpg", "error": "This picture is damaged or incomplete and cannot be opened."}
    assert good["label"] == "meme"


def test_every_error_has_a_status_and_a_sentence(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"content-type": "multipart/form-data; boundary=x"}
    big = [("pictures", (f"{n}.jpg", bytes(10_000_000))) for n in range(11)]
    too_many = [("pictures", (f"{n}.jpg", b"x")) for n in range(101)]
    for status, response in (
        (422, client.post("/api/classify", files=pictures(("bad.jpg", b"nothing")))),
        (422, client.post("/api/classify", files=pictures(("empty.jpg", b"")))),
        (422, client.post("/api/classify?overlays=maybe", files=pictures(("cat.jpg", MEME)))),
        (422, client.post("/api/classify", files=[("other", ("cat.jpg", MEME))])),
        (422, client.post("/api/classify", files=too_many)),
        (422, client.post("/api/classify", content=b"--y\r\nnonsense", headers=broken)),
        (422, client.post("/api/classify", content=b"", headers={"content-type": "multipart/form-data"})),
        (415, client.post("/api/classify", content=MEME, headers={"content-type": "image/jpeg"})),
        (415, client.post("/api/classify")),
        (413, client.post("/api/classify", files=big)),
        (405, client.get("/api/classify")),
        (405, client.put("/api/classify")),
        (405, client.post("/api/openapi.json")),
        (404, client.get("/api/nothing")),
    ):
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        sentence = response.json()["error"]
        assert sentence.endswith(".") or sentence.startswith("The body cannot be read: ")
    assert client.get("/api/classify").headers["allow"] == "POST"

    def load() -> None:
        raise BadCheckpoint("There is no checkpoint.")

    monkeypatch.setattr(serve, "load_classifier", load)
    response = client.post("/api/classify", files=pictures(("cat.jpg", MEME)))
    assert (response.status_code, response.json()) == (503, {"error": "There is no checkpoint."})


def test_concurrent_first_requests_load_one_network(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []

    def slowly() -> object:
        time.sleep(0.2)
        loaded.append(object())
        return loaded[-1]

    monkeypatch.setattr(Classifier, "load", slowly)
    serve._load_classifier.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        returned = list(pool.map(lambda _: serve.load_classifier(), range(4)))
    serve._load_classifier.cache_clear()
    assert loaded * 4 == returned


def test_requests_beyond_the_limit_get_429(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(name: str, _data: bytes, *, with_overlay: bool) -> dict[str, Any]:  # noqa: ARG001
        time.sleep(0.05)
        return {"name": name}

    monkeypatch.setattr(serve, "classify_picture", slowly)
    room = pictures_at_once() + serve.MAX_WAITING

    async def ask_at_once(count: int) -> list[Response]:
        transport = ASGITransport(Starlette(routes=list(serve.routes)))
        async with AsyncClient(transport=transport, base_url="http://test") as asking:
            asked = (asking.post("/api/classify", files=pictures(("cat.jpg", MEME))) for _ in range(count))
            return await asyncio.gather(*asked)

    for _ in range(2):  # the slots are free again afterwards
        responses = asyncio.run(ask_at_once(room + 20))
        assert Counter(response.status_code for response in responses) == {200: room, 429: 20}
        assert all(int(r.headers["retry-after"]) > 0 for r in responses if r.status_code == 429)


def test_overlays_are_limited_in_size_and_number(client: TestClient) -> None:
    large = encode(noise(2000, 1500), "JPEG")
    (row,) = client.post("/api/classify?overlays=true", files=pictures(("large.jpg", large))).json()["pictures"]
    with Image.open(BytesIO(base64.b64decode(row["overlay_png"]))) as heatmap:
        assert heatmap.size == (800, 600)
    many = pictures(*[(f"{number}.jpg", MEME) for number in range(11)])
    refused = client.post("/api/classify?overlays=true", files=many)
    assert (refused.status_code, refused.json()["error"]) == (
        422,
        "The limit for one request with overlays is 10 pictures.",
    )


def test_a_name_that_utf_8_cannot_encode_is_answered(client: TestClient) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="pictures"; filename="\\ud800.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + MEME + b"\r\n--x--\r\n"
    )
    strange = {"content-type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    response = client.post("/api/classify", content=body, headers=strange)
    assert response.status_code == 200
    assert response.json()["pictures"][0]["name"] == "?.jpg"


def test_uploads_never_touch_the_disk(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def rollover(_self: object) -> None:
        raise AssertionError("written to the disk")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", rollover)
    big = encode(noise(3000, 2000), "BMP")[:9_900_000]
    response = client.post("/api/classify", files=pictures(("big.bmp", big), ("cat.jpg", MEME)))
    assert response.status_code == 200
    assert "error" in response.json()["pictures"][0]


async def verdict_on_the_page(address: str) -> str:
    async with Visitor(address) as session:
        return (await session.ask("cat.jpg", MEME)).verdict


def test_one_process_serves_the_page_and_the_api(address: str) -> None:
    with Client(base_url=address, timeout=60) as browser:
        (row,) = browser.post("/api/classify", files=pictures(("cat.jpg", MEME))).json()["pictures"]
        assert row["label"] == "meme"
        assert "[Meme]" in asyncio.run(verdict_on_the_page(address))
        assert browser.get("/api/openapi.json").json()["info"]["title"] == "Meme Classifier"


@pytest.mark.parametrize("said", ["true", "1", "True", "TRUE", "yes", "on", "false", "0", "False", "no", "off"])
def test_overlays_takes_the_usual_words(client: TestClient, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def classify_picture(name: str, _data: bytes, *, with_overlay: bool) -> dict[str, Any]:
        return {"name": name, "with_overlay": with_overlay}

    monkeypatch.setattr(serve, "classify_picture", classify_picture)
    response = client.post(f"/api/classify?overlays={said}", files=pictures(("cat.jpg", MEME)))
    (row,) = response.json()["pictures"]
    assert row["with_overlay"] == (said.lower() in ("true", "1", "yes", "on"))


@pytest.mark.parametrize("said", ["", "maybe", "2", "truefalse", "-1"])
def test_overlays_takes_no_other_words(client: TestClient, said: str) -> None:
    response = client.post(f"/api/classify?overlays={said}", files=pictures(("cat.jpg", MEME)))
    assert (response.status_code, response.json()) == (422, {"error": "overlays must be true or false."})


PREFLIGHT = {"Access-Control-Request-Method": "POST"}


def test_other_origins_cannot_read_answers_by_default(client: TestClient) -> None:
    for response in (
        client.get("/api/openapi.json", headers={"Origin": "https://a.example"}),
        client.options("/api/classify", headers=PREFLIGHT | {"Origin": "https://a.example"}),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_base_path_and_origins_of_streamlit_hold_for_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    base_path = "/in/memes"
    monkeypatch.setenv("STREAMLIT_SERVER_CORS_ALLOWED_ORIGINS", "https://a.example https://b.example")
    with running_server("serve.py", base_path=base_path) as (address, _), Client(timeout=60) as browser:
        description = browser.get(f"{address}/api/openapi.json").json()
        assert description["servers"] == [{"url": base_path}]
        assert browser.post(f"{address}/api/classify").status_code == 415
        assert browser.get(f"{address}/api/nothing").json()["error"].count(f"{base_path}/api/openapi.json") == 1
        outside = address.removesuffix(base_path)
        assert browser.post(f"{outside}/api/classify").status_code in (404, 405)
        for origin, allowed in (("https://b.example", "https://b.example"), ("https://c.example", None)):
            preflight = browser.options(f"{address}/api/classify", headers=PREFLIGHT | {"Origin": origin})
            answer = browser.post(f"{address}/api/classify", headers={"Origin": origin})
            for response in (preflight, answer):
                assert response.headers.get("access-control-allow-origin") == allowed
            assert preflight.status_code == (200 if allowed else 400)
            assert answer.headers["access-control-expose-headers"] == "Retry-After"
        with ExitStack() as uploads:  # of 100 MB each that have begun, until there are too many
            for _ in range(12):
                upload = uploads.enter_context(closing(HTTPConnection(outside.removeprefix("http://"), timeout=60)))
                upload.putrequest("POST", f"{base_path}/api/classify")
                for name, value in (
                    ("Content-Type", "multipart/form-data; boundary=x"),
                    ("Content-Length", "100000000"),
                    ("Origin", "https://b.example"),
                ):
                    upload.putheader(name, value)
                upload.endheaders()
            refused = upload.getresponse()
            assert refused.status == 503
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["access-control-allow-origin"] == "https://b.example"
            assert refused.headers["access-control-expose-headers"] == "Retry-After"


def test_refused_uploads_to_a_session_can_be_read_by_named_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessions.MAX_SESSION_BYTES", 100)
    origin = "https://a.example"
    for origins, allowed in (([origin], origin), (["https://b.example"], None), ([], None)):
        client = TestClient(UploadLimitMiddleware(Starlette(), origins=origins))
        refused = client.put(f"{UPLOAD_PATH}session/file", content=bytes(200), headers={"Origin": origin})
        assert refused.status_code == 413
        assert refused.headers.get("access-control-allow-origin") == allowed
        assert ("access-control-expose-headers" in refused.headers) == bool(origins)


@pytest.mark.parametrize(
    ("option", "expected"),
    [("", ""), ("/", ""), ("memes", "/memes"), ("/memes", "/memes"), ("memes/", "/memes"), ("/a/b/", "/a/b")],
)
def test_the_base_path_may_have_slashes_or_not(option: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamlit.get_option", {"server.baseUrlPath": option}.__getitem__)
    assert serve.base_path() == expected


def test_the_openapi_description_lists_what_exists(client: TestClient) -> None:
    description = client.get("/api/openapi.json").json()
    assert description["openapi"].startswith("3.")
    assert list(description["paths"]) == ["/api/classify"]
    answers = description["paths"]["/api/classify"]["post"]["responses"]
    assert set(answers) == {"200", "413", "415", "422", "429", "503"}


schema = schemathesis.openapi.from_asgi("/api/openapi.json", Starlette(routes=list(serve.routes)))


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_responses_match_the_openapi_description(case: schemathesis.Case[Any]) -> None:
    # A schema cannot say that bytes must be a readable picture, so valid requests may be refused.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])
