"""The page as a visitor meets it: the real server, the real checkpoint, a real Chromium."""

import base64
import csv
import re
from collections.abc import Iterator
from io import BytesIO
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from draw import captioned, mountains
from numpy.typing import NDArray
from pictures import ROOT, encode
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, Route, expect

WIDTHS = pytest.mark.parametrize(("width", "height"), [(1440, 1000), (390, 844)], ids=["desktop", "phone"])
PATIENCE = 60_000  # ms; the first answer waits for the network to load, perhaps beside other work
expect.set_options(timeout=PATIENCE)


@pytest.fixture
def page(browser: Browser, address: str, width: int, height: int) -> Iterator[Page]:
    """The opened page; afterwards, nothing may have gone wrong behind the scenes."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "requestfailed", lambda request: wrong.append(request.url) if request.failure != "net::ERR_ABORTED" else None
    )
    strangers: list[str] = []
    page.on("request", lambda request: strangers.append(request.url) if address not in request.url else None)
    page.goto(address)
    expect(page.get_by_role("heading", name="Meme or not a meme?")).to_be_visible(timeout=PATIENCE)
    yield page
    page.close()
    assert wrong == []
    assert [url for url in strangers if not url.startswith(("data:", "blob:"))] == []


def file(name: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def expect_answer(page: Page, words: str) -> None:
    """The answer in words, beside it the picture and its heatmap, both loaded."""
    answer = page.locator(".st-key-answer")
    expect(answer.locator("h2")).to_have_text(words, timeout=PATIENCE)
    expect(answer.get_by_text("Probability that this is a meme")).to_be_visible()
    for alt in ("The picture as it was judged", "heatmap"):
        image = answer.locator(f"img[alt*='{alt}']")
        expect(image).to_be_visible()
        page.wait_for_function("image => image.complete && image.naturalWidth > 100", arg=image.element_handle())
    expect(page.get_by_test_id("stAlert")).to_have_count(0)
    settled(page)


def settled(page: Page) -> None:
    """Nothing is being redrawn: a download button that is about to be replaced gives nothing."""
    page.wait_for_timeout(300)
    expect(page.get_by_test_id("stApp")).to_have_attribute("data-test-script-state", "notRunning")


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_a_visitor_reads_the_answers(page: Page) -> None:
    meme, plain = encode(captioned(mountains(), "ONE DOES NOT SIMPLY", "TAKE A DAY OFF")), encode(mountains())
    upload = page.locator("input[type=file]").first

    upload.set_input_files(file("meme.png", meme))
    expect_answer(page, "Meme")
    upload.set_input_files(file("plain.png", plain))
    expect_answer(page, "Not a meme")

    photo = encode(mountains().resize((2400, 1800)), "JPEG")
    upload.set_input_files(file("photo.jpg", photo))
    expect_answer(page, "Not a meme")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the heatmap").click()
    with Image.open(download.value.path()) as heatmap:
        assert heatmap.size == (2400, 1800)

    upload.set_input_files(file("broken.png", plain[:5000]))
    answer = page.locator(".st-key-answer")
    expect(answer.get_by_text("This picture is damaged or incomplete and cannot be opened.")).to_be_visible()
    expect(answer.locator("img")).to_have_count(0)

    paste(page, meme)
    expect_answer(page, "Meme")
    page.get_by_text("Mountains", exact=True).click()
    expect_answer(page, "Not a meme")
    for _ in range(2):
        with page.expect_download() as download:
            page.get_by_role("button", name="Download the heatmap").click()
        with Image.open(download.value.path()) as heatmap:
            assert (heatmap.format, heatmap.size) == ("PNG", mountains().size)

    # Streamlit's own scrolling area; the document never gets wider than the window.
    assert page.get_by_test_id("stMain").evaluate("area => area.scrollWidth <= area.clientWidth")


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_a_visitor_puts_a_heatmap_to_the_test(page: Page) -> None:
    page.get_by_text("Cat meme", exact=True).click()
    expect_answer(page, "Meme")
    answer = page.locator(".st-key-answer")
    method = answer.get_by_test_id("stSelectbox").locator("input")
    method.scroll_into_view_if_needed()
    settled(page)  # a list that opens while the page scrolls closes again
    method.click()
    page.get_by_role("option", name="LayerCAM", exact=True).click()
    settled(page)
    answer.get_by_text("Viridis", exact=True).click()
    expect(answer.get_by_text("yellow: strong")).to_be_visible()
    answer.get_by_text("Test the heatmap", exact=True).click()
    expect(answer.get_by_text("Without the strongest 20% of the heatmap (blurred): meme")).to_be_visible()
    expect(answer.locator("img[alt='Your picture without the strongest 20%']")).to_be_visible()
    settled(page)
    with page.expect_download() as download:
        answer.get_by_role("button", name="Download the heatmap").click()
    with Image.open(download.value.path()) as heatmap:
        assert heatmap.info["Method"] == "LayerCAM"
        assert len(heatmap.info["Checkpoint SHA-256"]) == 64


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_a_visitor_sorts_several_pictures(page: Page) -> None:
    meme, plain = encode(captioned(mountains(), "ONE DOES NOT SIMPLY", "TAKE A DAY OFF")), encode(mountains())
    name = "**bold** <img src=x onerror=alert(1)>.png"
    files = [file("meme.png", meme), file(name, plain), file("broken.png", plain[:5000])]
    page.locator("input[type=file]").first.set_input_files(files)
    gallery = page.locator(".st-key-gallery")
    expect(gallery.get_by_text("Meme: 1 · Not a meme: 1 · Not sure: 0 · Cannot be read: 1")).to_be_visible()
    expect(gallery.get_by_text(name, exact=True)).to_be_visible()
    expect(gallery.get_by_text("This picture is damaged or incomplete and cannot be opened.")).to_be_visible()

    settled(page)
    gallery.get_by_role("button", name="Open 2", exact=True).click()
    dialog = page.get_by_role("dialog", name="Picture 2")
    expect(dialog.get_by_role("heading", name="Not a meme")).to_be_visible()
    expect(dialog.locator("img[alt*='heatmap']")).to_be_visible()
    dialog.get_by_text("Viridis", exact=True).click()
    expect(dialog.get_by_text("yellow: strong")).to_be_visible()
    dialog.get_by_text("meme", exact=True).last.click()
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)
    expect(gallery.get_by_text("you: meme")).to_be_visible()
    settled(page)
    dialog = page.get_by_role("dialog", name="Picture 1")
    gallery.get_by_role("button", name="Open 1", exact=True).click()
    expect(dialog.get_by_role("heading", name="Meme")).to_be_visible()
    expect(dialog.get_by_text("yellow: strong")).to_be_visible()  # the same colours as chosen before
    page.locator("input[type=file]").first.set_input_files(file("late.png", encode(mountains().rotate(180))))
    expect(gallery.get_by_text("late.png", exact=True)).to_be_attached()
    settled(page)
    expect(dialog.get_by_text("meme.png", exact=True)).to_be_visible()  # an upload does not close it
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="Remove late.png").click()
    expect(gallery.get_by_text("late.png", exact=True)).to_have_count(0)
    settled(page)
    expect(dialog).to_have_count(0)

    with page.expect_download() as download:
        gallery.get_by_role("button", name="Table (CSV)").click()
    with download.value.path().open(newline="", encoding="utf-8-sig") as table:
        rows = list(csv.DictReader(table))
    assert [row["path"] for row in rows] == ["meme.png", name, "broken.png"]
    assert [(row["verdict"], row["correction"]) for row in rows[:2]] == [("meme", ""), ("not_meme", "meme")]
    with page.expect_download() as download:
        gallery.get_by_role("button", name="Pictures, sorted (ZIP)").click()
    with ZipFile(download.value.path()) as archive:
        assert [archive.read(member) for member in archive.namelist()] == [meme, plain]
        assert all(member.startswith("meme/") for member in archive.namelist())
    assert page.get_by_test_id("stMain").evaluate("area => area.scrollWidth <= area.clientWidth")


def paste(page: Page, data: bytes) -> None:
    """Paste a picture as Ctrl+V does; Streamlit's upload area takes it when it has the focus."""
    area = page.get_by_test_id("stFileUploaderDropzone").first
    area.focus()
    area.evaluate(
        """(area, data) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const clipboard = new DataTransfer();
            clipboard.items.add(new File([bytes], "image.png", {type: "image/png"}));
            area.dispatchEvent(new ClipboardEvent("paste", {clipboardData: clipboard, bubbles: true}));
        }""",
        base64.b64encode(data).decode(),
    )


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_the_background_fills_the_page_and_is_sent_once(page: Page) -> None:
    style = "getComputedStyle(document.querySelector('.stApp'))"
    page.wait_for_function(f"{style}.backgroundImage.startsWith('url(\"data:image/png;base64,')")
    assert page.evaluate(f"{style}.backgroundSize") == "cover"
    assert page.evaluate(f"{style}.opacity") == "1"
    frames: list[int] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(len(frame))))
    page.reload()
    expect(page.get_by_text("Or try one of ours")).to_be_visible()
    picture = (ROOT / "background.png").stat().st_size
    assert max(frames) > picture
    frames.clear()
    page.get_by_text("Mountains", exact=True).click()
    expect_answer(page, "Not a meme")
    assert 0 < sum(frames) < picture


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_all_text_is_legible_on_the_background(page: Page) -> None:
    page.get_by_text("Cat meme", exact=True).click()
    expect_answer(page, "Meme")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": 2200})  # type: ignore[index]
    texts: list[dict[str, Any]] = page.evaluate(
        """() => [...document.querySelectorAll(".st-key-page *")].filter(element =>
            element.checkVisibility() && !element.closest("[data-testid=stImageContainer]") &&
            [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
        ).map(element => {
            const box = element.getBoundingClientRect();
            return {text: element.textContent, colour: getComputedStyle(element).color,
                    box: [box.left, box.top, box.right, box.bottom]};
        })"""
    )
    assert len(texts) > 12
    page.add_style_tag(content="* { color: transparent !important }")
    with Image.open(BytesIO(page.screenshot(animations="disabled"))) as screenshot:
        pixels = np.asarray(screenshot.convert("RGB"))
    for text in texts:
        left, top, right, bottom = (int(edge) for edge in text["box"])
        behind = pixels[max(0, top) : bottom, max(0, left) : right].reshape(-1, 3)
        assert len(behind), text
        assert contrast(page, text["colour"], behind) >= 4.5, text


def contrast(page: Page, colour: str, behind: NDArray[np.uint8]) -> float:
    """The least contrast of a CSS colour with pixels of shape (N, 3) (WCAG 2.2, contrast ratio)."""
    red, green, blue, alpha = page.evaluate(
        """colour => {
            const context = new OffscreenCanvas(1, 1).getContext("2d");
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
            return [...context.getImageData(0, 0, 1, 1).data];
        }""",
        colour,
    )
    text = np.array([red, green, blue]) * alpha / 255 + behind * (1 - alpha / 255)
    one, other = luminance(text), luminance(behind.astype(float))
    return float(((np.maximum(one, other) + 0.05) / (np.minimum(one, other) + 0.05)).min())


def luminance(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative luminance of sRGB colours of shape (N, 3), from 0 to 255 (WCAG 2.2)."""
    scaled = colours / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ np.array([0.2126, 0.7152, 0.0722]))


def test_the_page_works_under_the_proxys_policy(browser: Browser, address: str) -> None:
    """Whatever the policy of deploy/Caddyfile forbids would be an error on the console."""
    (policy,) = re.findall(r'Content-Security-Policy "(.*)"', (ROOT / "deploy" / "Caddyfile").read_text())
    policy = policy.replace("wss://{$SITE}", address.replace("http", "ws"))
    page = browser.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)

    def with_policy(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, headers=response.headers | {"content-security-policy": policy})

    page.route(lambda url: url.rstrip("/") == address, with_policy)
    page.goto(address)
    page.locator("input[type=file]").first.set_input_files(file("mountains.png", encode(mountains())))
    expect_answer(page, "Not a meme")
    blocked = page.evaluate("fetch('https://example.org').then(() => 'reached', () => 'blocked')")
    assert blocked == "blocked"
    assert len([text for text in wrong if "example.org" not in text]) == 0, wrong
    page.close()
