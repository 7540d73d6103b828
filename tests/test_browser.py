"""The page as a visitor meets it: the real server, the real checkpoint, a real Chromium."""

import base64
import csv
import json
import re
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from draw import captioned, mountains
from numpy.typing import NDArray
from pictures import ROOT, encode, noise
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Locator, Page, Route, expect

from benchmarks.page import running_server

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}
WIDTHS = pytest.mark.parametrize(("width", "height"), SIZES.values(), ids=SIZES)
DESKTOP = pytest.mark.parametrize(("width", "height"), [SIZES["desktop"]], ids=["desktop"])
PHONE = pytest.mark.parametrize(("width", "height"), [SIZES["phone"]], ids=["phone"])
PATIENCE = 60_000  # ms; the first answer waits for the network to load, perhaps beside other work
MEME = encode(captioned(mountains(), "ONE DOES NOT SIMPLY", "TAKE A DAY OFF"))
PLAIN = encode(mountains())
expect.set_options(timeout=PATIENCE)


def open_page(browser: Browser, address: str, width: int, height: int) -> Page:
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    expect(page.get_by_role("heading", name="Meme or not a meme?")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("button", name="Mountains", exact=True)).to_be_visible()
    settled(page)
    return page


@pytest.fixture
def page(browser: Browser, address: str, width: int, height: int) -> Iterator[Page]:
    """The opened page; afterwards, nothing may have gone wrong behind the scenes."""
    page = open_page(browser, address, width, height)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "requestfailed", lambda request: wrong.append(request.url) if request.failure != "net::ERR_ABORTED" else None
    )
    strangers: list[str] = []
    page.on("request", lambda request: strangers.append(request.url) if address not in request.url else None)
    yield page
    # Streamlit's own scrolling area; the document never gets wider than the window.
    assert page.get_by_test_id("stMain").evaluate("area => area.scrollWidth <= area.clientWidth")
    page.close()
    assert wrong == []
    assert [url for url in strangers if not url.startswith(("data:", "blob:"))] == []


def file(name: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": "", "buffer": data}


def upload(page: Page, *files: FilePayload) -> None:
    page.locator("input[type=file]").first.set_input_files(list(files))


def expect_answer(page: Page, words: str, name: str) -> None:
    """The answer in words, beside it the picture and its heatmap, both loaded."""
    answer = page.locator(".st-key-answer")
    expect(answer.locator(".name")).to_have_text(name)
    expect(answer.locator("h2")).to_have_text(words)
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
    expect(page.locator("progress:visible")).to_have_count(0)


def remove_all(page: Page) -> None:
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator(".st-key-answer, .st-key-gallery")).to_have_count(0)
    settled(page)


def top(locator: Locator) -> float:
    """CSS pixels from the top of the window."""
    box = locator.bounding_box()
    assert box
    return box["y"]


def assert_accessible(page: Page) -> None:
    """axe-core finds nothing serious, targets are 24 pixels high, and the focus can be seen."""
    violations = Axe().run(page).response["violations"]
    found = [(one["id"], one["nodes"][0]["html"]) for one in violations if one["impact"] in ("serious", "critical")]
    assert found == []
    small = page.evaluate(
        """() => [...document.querySelectorAll(".st-key-page :is(button, a), [role=dialog] :is(button, a)")]
            .filter(element => element.checkVisibility())
            .map(element => [element.getBoundingClientRect(), element.outerHTML])
            .filter(([box]) => box.width && Math.min(box.width, box.height) < 24).map(([_, html]) => html)"""
    )
    assert small == []


def continue_late(route: Route) -> None:
    """Let a request wait for 0.3 s."""
    time.sleep(0.3)
    route.continue_()


@DESKTOP
def test_the_first_visit_explains_and_nothing_jumps(
    page: Page, browser: Browser, address: str, width: int, height: int
) -> None:
    measured = json.loads((ROOT / "outputs" / "metrics.json").read_text())
    for text in ("A meme is a picture", "Not a meme: photos", "deleted when you close the tab"):
        expect(page.get_by_text(text)).to_be_visible()
    expect(page.get_by_text(f"Right on {measured['accuracy']['value']:.0%}")).to_be_visible()
    weakest = min(group["accuracy"] for group in measured["groups"].values())
    expect(page.get_by_text(f"({weakest:.0%})")).to_be_visible()
    expect(page.locator(".st-key-examples img")).to_have_count(len(list((ROOT / "examples").glob("*.jpg"))))
    assert_accessible(page)
    with page.expect_popup() as card:
        page.get_by_role("link", name="Model card").click()
    expect(card.value.get_by_role("heading").first).to_be_visible()
    card.value.close()
    for styles_are_late in (False, False, False, True, True):
        visitor = browser.new_context(viewport={"width": width, "height": height}).new_page()
        if styles_are_late:  # they wait for the part of Streamlit that shows HTML, which the browser fetches by itself
            visitor.route("**/Html*.js", continue_late)
        visitor.add_init_script(
            """window.shift = 0;
            new PerformanceObserver(list => list.getEntries().forEach(entry => { window.shift += entry.value; }))
                .observe({type: "layout-shift", buffered: true});"""
        )
        visitor.goto(address)
        expect(visitor.get_by_role("button", name="Mountains", exact=True)).to_be_visible()
        settled(visitor)
        assert visitor.evaluate("window.shift") < 0.1
        visitor.context.close()


@WIDTHS
@pytest.mark.usefixtures("height")
def test_a_visitor_reads_the_answers(page: Page, width: int) -> None:
    upload(page, file("meme.png", MEME))
    expect_answer(page, "Meme", "meme.png")
    answer, desktop = page.locator(".st-key-answer"), width > 640
    heatmap = answer.locator("img[alt*='heatmap']")
    assert top(answer.locator("h2")) <= (260 if desktop else 330)
    assert top(answer.locator("img[alt*='judged']")) <= 520
    assert top(heatmap) <= (400 if desktop else 844)
    size: Any = heatmap.bounding_box()
    assert size["width"] >= 300
    assert page.locator(".st-key-page").bounding_box()["height"] <= 1700  # type: ignore[index]
    expect(answer.get_by_text("What speaks for a meme: strong")).to_be_visible()
    expect(answer.get_by_text(re.compile(r"Of 100 unseen pictures scored like this, \d+ were memes"))).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="meme.png: Meme")).to_have_count(1)
    assert_accessible(page)

    answer.get_by_role("button", name="Not a meme").click()
    expect(answer.locator("h2")).to_have_text("Not a meme")
    expect(answer.get_by_text("The classifier's verdict: Meme")).to_be_visible()
    page.keyboard.press("u")
    expect(answer.locator("h2")).to_have_text("Meme")
    remove_all(page)

    photo = encode(mountains().resize((2400, 1800)), "JPEG")
    upload(page, file("no ending", photo))
    expect_answer(page, "Not a meme", "no ending")
    for _ in range(2):
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        with Image.open(download.value.path()) as picture:
            assert (picture.format, picture.size) == ("PNG", (2400, 1800))
    remove_all(page)

    for name, data, sentence in (
        ("holiday.pdf", b"%PDF-1.7", "holiday.pdf is not a picture in a format we read"),
        ("_big_.jpg", bytes(11_000_000), "_big_.jpg has 11 MB; the limit is 10 MB."),
        ("broken.HIF", PLAIN[:5000], "broken.HIF is damaged or incomplete and cannot be opened."),
    ):
        upload(page, file(name, data))
        expect(answer.get_by_text(sentence)).to_be_visible()
        expect(answer.locator("img, h2")).to_have_count(0)
        expect(page.get_by_role("status").filter(has_text=sentence)).to_have_count(1)
        remove_all(page)

    paste(page, MEME)
    expect_answer(page, "Meme", "image.png")
    remove_all(page)
    page.get_by_role("button", name="Mountains", exact=True).click()
    expect_answer(page, "Not a meme", "Example: Mountains")


def paste(page: Page, data: bytes) -> None:
    """Paste a picture as Ctrl+V does, with the focus nowhere."""
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const clipboard = new DataTransfer();
            clipboard.items.add(new File([bytes], "image.png", {type: "image/png"}));
            document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: clipboard, bubbles: true}));
        }""",
        base64.b64encode(data).decode(),
    )


@WIDTHS
@pytest.mark.usefixtures("height")
def test_the_page_adapts_to_the_visitors_settings(page: Page, width: int) -> None:
    """Forced colours, reduced motion, and a keyboard."""
    page.emulate_media(forced_colors="active", reduced_motion="reduce")
    page.get_by_role("button", name="Cat meme", exact=True).click()
    expect_answer(page, "Meme", "Example: Cat meme")
    answer = page.locator(".st-key-answer")
    with Image.open(BytesIO(answer.locator("h2").screenshot())) as words:
        assert np.ptp(np.asarray(words.convert("L"))) > 128
    bar = answer.get_by_role("progressbar")
    with Image.open(BytesIO(bar.screenshot())) as painted:
        middle = np.asarray(painted.convert("RGB")).astype(int)[painted.height // 2]
    filled, empty = middle[len(middle) // 10], middle[-3]  # the cat's probability lies between 90 % and 99 %
    assert np.abs(filled - empty).sum() > 96
    moving = page.evaluate(
        """() => document.getAnimations().map(one => one.effect.getComputedTiming())
            .filter(timing => timing.duration > 1 && timing.activeDuration > 1).length"""
    )
    assert moving == 0
    durations = page.evaluate(
        """() => [...document.querySelectorAll("button, a, img, [role=progressbar] *")].flatMap(element =>
            [getComputedStyle(element).transitionDuration, getComputedStyle(element).animationDuration])"""
    )
    assert max(float(part.strip().removesuffix("s")) for text in durations for part in text.split(",")) <= 0.001
    page.emulate_media(forced_colors="none", reduced_motion="reduce")

    heatmap = answer.get_by_role("button", name="Fullscreen: The same picture under its heatmap")
    if width > 640:
        answer.get_by_role("button", name="Fullscreen: The picture as it was judged").focus()
        page.keyboard.press("Tab")
    else:
        heatmap.focus()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
    assert_focus_ring(heatmap)
    page.keyboard.press("Enter")
    close = page.get_by_role("button", name="Close fullscreen")
    expect(close).to_be_visible()
    close.focus()
    page.keyboard.press("Shift")  # so that the browser shows the focus
    assert_focus_ring(close)
    page.keyboard.press("Enter")
    expect(close).to_have_count(0)


def assert_focus_ring(button: Locator) -> None:
    """A button has the focus, shows it, and is large enough to press."""
    expect(button).to_be_focused()
    width, style = button.evaluate("one => [getComputedStyle(one).outlineWidth, getComputedStyle(one).outlineStyle]")
    assert (float(width.removesuffix("px")) >= 2, style) == (True, "solid")
    assert button.evaluate("one => one.checkVisibility({opacityProperty: true, visibilityProperty: true})")
    box: Any = button.bounding_box()
    assert min(box["width"], box["height"]) >= 24


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_a_visitor_puts_a_heatmap_to_the_test(page: Page) -> None:
    page.get_by_role("button", name="Cat meme", exact=True).click()
    expect_answer(page, "Meme", "Example: Cat meme")
    answer = page.locator(".st-key-answer")
    answer.get_by_role("button", name="Display").click()
    method = page.get_by_test_id("stSelectbox").locator("input")
    method.scroll_into_view_if_needed()
    settled(page)  # a list that opens while the page scrolls closes again
    method.click()
    page.get_by_role("option", name="LayerCAM", exact=True).click()
    settled(page)
    page.get_by_text("Viridis", exact=True).click()
    expect(page.get_by_text("yellow: strong")).to_be_visible()
    page.keyboard.press("Escape")
    answer.get_by_text("Test the heatmap", exact=True).click()
    expect(answer.get_by_text(re.compile(r"^(Holds|Partly|Does not hold): .*\d+% → \d+%"))).to_be_visible()
    expect(answer.locator("img[alt='Your picture without the strongest 20%']")).to_be_visible()
    settled(page)
    with page.expect_download() as download:
        answer.get_by_role("button", name="Download").click()
    with Image.open(download.value.path()) as heatmap:
        assert heatmap.info["Method"] == "LayerCAM"
        assert len(heatmap.info["Checkpoint SHA-256"]) == 64


def assert_cards_fill_their_rows(page: Page) -> None:
    """Equal heights in a row, no gutter wider than a gap, and names in one line no larger than the verdict."""
    rows: dict[float, list[Any]] = {}
    for card in page.locator("[class*='st-key-item-']").all():
        box: Any = card.bounding_box()
        rows.setdefault(round(box["y"]), []).append(box)
        sizes = [
            card.locator(part).evaluate("element => parseFloat(getComputedStyle(element).fontSize)")
            for part in (".verdict", ".name")
        ]
        assert sizes[0] >= sizes[1]
        name: Any = card.locator(".name").bounding_box()
        assert name["height"] < 2 * sizes[1]
    for row in rows.values():
        assert max(box["height"] for box in row) - min(box["height"] for box in row) <= 1
    area: Any = page.locator(".st-key-cards").bounding_box()
    first, second, *others = next(iter(rows.values()))
    last = [first, second, *others][-1]
    assert area["x"] + area["width"] - last["x"] - last["width"] < second["x"] - first["x"] - first["width"]


NAME = "**bold** <img src=x onerror=alert(1)>.png"


def correct_ten(page: Page, dialog: Locator) -> None:
    """Ten corrections with twenty keys typed at once, after an undo; nothing closes in between."""
    for correction, key in (("Meme", "m"), ("Not a meme", "n")):
        page.keyboard.press(key)
        expect(dialog.get_by_role("heading", name=correction, exact=True)).to_be_visible()
    page.keyboard.press("u")
    expect(dialog.get_by_role("heading", name="Not a meme")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(dialog.get_by_role("status")).to_have_text(re.compile("^meme.png: Meme, "))
    for _ in range(10):
        page.keyboard.press("m")
        page.keyboard.press("ArrowRight")
    expect(dialog.get_by_text("11 of 12")).to_be_visible()
    expect(dialog.get_by_role("heading", name="Not a meme", exact=True)).to_be_visible()
    counts = page.locator("strong", has_text="Meme: 10 · Not a meme: 1 · Not sure: 0 · Cannot be read: 1")
    expect(counts).to_be_attached()
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    settled(page)


@WIDTHS
def test_a_visitor_sorts_several_pictures(page: Page, width: int, height: int) -> None:
    others = [file(f"a_long_name_of_a_photo_{seed}.png", encode(noise(90, 60, seed))) for seed in range(9)]
    upload(page, file("meme.png", MEME), file(NAME, PLAIN), *others, file("broken.png", PLAIN[:5000]))
    gallery = page.locator(".st-key-gallery")
    counts = gallery.get_by_text("Meme: 1 · Not a meme: 10 · Not sure: 0 · Cannot be read: 1")
    expect(counts).to_be_visible()
    settled(page)
    expect(page.locator(".st-key-answer")).to_have_count(0)
    expect(gallery.get_by_text(NAME, exact=True)).to_be_visible()
    expect(gallery.get_by_text("This picture is damaged or incomplete and cannot be opened.")).to_be_visible()
    assert top(counts) <= 600
    cards = page.locator("[class*='st-key-item-']")
    if width > 640:
        box: Any = cards.first.bounding_box()
        assert box["y"] + box["height"] <= height
    assert_cards_fill_their_rows(page)
    expect(page.get_by_role("radio", name="Not a meme 10")).to_be_attached()
    assert_accessible(page)

    cards.nth(1).click(position={"x": 5, "y": 5})  # anywhere on it
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".name")).to_have_text(NAME)
    expect(dialog.locator("img[alt*='heatmap']")).to_be_visible()
    settled(page)
    assert_accessible(page)
    correct_ten(page, dialog)

    with page.expect_download() as download:
        gallery.get_by_role("button", name="Table (CSV)").click()
    with download.value.path().open(newline="", encoding="utf-8-sig") as table:
        rows_of_table = list(csv.DictReader(table))
    assert [row["path"] for row in rows_of_table][:2] == ["meme.png", NAME]
    assert [(row["verdict"], row["correction"], row["final"]) for row in rows_of_table[1:2]] == [
        ("not_meme", "meme", "meme")
    ]
    with page.expect_download() as download:
        gallery.get_by_role("button", name="Only the memes (ZIP)").click()
    with ZipFile(download.value.path()) as archive:
        assert [archive.read(member) for member in archive.namelist()[:2]] == [MEME, PLAIN]
        assert len(archive.namelist()) == 10
    remove_all(page)


@PHONE
@pytest.mark.usefixtures("height", "width")
def test_something_moves_until_the_end(page: Page) -> None:
    files = [file(f"{seed}.png", encode(noise(60, 60, seed))) for seed in range(60)]
    page.evaluate(
        """() => {
            window.seen = [];
            document.addEventListener("change", () => { window.began = performance.now(); }, true);
            window.watch = setInterval(() => {
                const bars = [...document.querySelectorAll("progress, [role=progressbar]")];
                window.seen.push([performance.now() - window.began, bars.some(bar => {
                    const box = bar.getBoundingClientRect();
                    return bar.checkVisibility() && box.height && box.bottom > 0 && box.top < innerHeight;
                }), document.body.innerText.includes("Not a meme: 60")]);
            }, 100);
        }"""
    )
    upload(page, *files)
    expect(page.locator("strong", has_text="Not a meme: 60")).to_be_visible()
    samples = [(time, moves) for time, moves, done in page.evaluate("window.seen") if time and time >= 300 and not done]
    assert len(samples) > 5
    assert [time for time, moves in samples if not moves] == []


@DESKTOP
@pytest.mark.parametrize("way", ["chosen", "dropped"])
@pytest.mark.usefixtures("height", "width")
def test_a_large_folder_is_taken_in_portions(page: Page, tmp_path: Path, way: str) -> None:
    trip = tmp_path / "Trip"
    (trip / "day 2").mkdir(parents=True)
    (trip / ".trash").mkdir()
    (trip / ".trash" / "old.png").write_bytes(b"hidden")
    for number in range(249):  # a browser lists 100 at a time
        (trip / f"{number:03}.png").write_bytes(b"no picture %d" % number)
    (trip / "day 2" / "photo.JPE").write_bytes(encode(noise(60, 60), "JPEG"))
    if way == "chosen":
        page.locator("input[type=file]").nth(1).set_input_files(trip)
    else:
        drop(page, trip)
    gallery = page.locator(".st-key-gallery")
    expect(gallery.get_by_text("Meme: 0 · Not a meme: 1 · Not sure: 0 · Cannot be read: 249")).to_be_visible(
        timeout=2 * PATIENCE
    )
    settled(page)
    with page.expect_download() as download:
        gallery.get_by_role("button", name="Table (CSV)").click()
    rows = list(csv.DictReader(download.value.path().read_text(encoding="utf-8-sig").splitlines()))
    assert [row["path"] for row in rows if row["verdict"]] == ["Trip/day 2/photo.JPE"]
    assert len(rows) == 250
    remove_all(page)


def drop(page: Page, path: Path) -> None:
    """Drop a file or folder on the title, far from the uploaders."""
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for step in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": step, "x": 300, "y": 60, "data": data})


def test_a_page_that_lost_its_session_works_again(browser: Browser) -> None:
    with running_server() as (address, _):
        port = int(address.rpartition(":")[2])
        page = open_page(browser, address, *SIZES["desktop"])
        page.get_by_role("button", name="Cat meme", exact=True).click()
        expect_answer(page, "Meme", "Example: Cat meme")
    with running_server(port=port):
        expect(page.get_by_text("The connection to the server was lost")).to_be_visible()
        settled(page)
        upload(page, file("plain.png", PLAIN))
        expect_answer(page, "Not a meme", "plain.png")
        page.close()


@DESKTOP
@pytest.mark.usefixtures("height", "width")
def test_the_background_fills_the_page_and_is_sent_once(page: Page) -> None:
    style = "getComputedStyle(document.querySelector('.stApp'))"
    page.wait_for_function(f"{style}.backgroundImage.startsWith('url(\"data:image/png;base64,')")
    assert page.evaluate(f"{style}.backgroundSize") == "cover"
    assert page.evaluate(f"{style}.opacity") == "1"
    frames: list[int] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(len(frame))))
    page.reload()
    expect(page.get_by_text("Or try an example")).to_be_visible()
    settled(page)
    assert max(frames) > (ROOT / "background.png").stat().st_size
    frames.clear()
    page.get_by_role("button", name="Mountains", exact=True).click()
    expect_answer(page, "Not a meme", "Example: Mountains")
    assert 0 < sum(frames) < 30_000  # neither the background, nor the style sheet, nor the thumbnails of the examples


@WIDTHS
@pytest.mark.usefixtures("height", "width")
def test_all_text_is_legible_on_the_background(page: Page) -> None:
    page.get_by_role("button", name="Cat meme", exact=True).click()
    expect_answer(page, "Meme", "Example: Cat meme")
    page.set_viewport_size({"width": page.viewport_size["width"], "height": 2200})  # type: ignore[index]
    texts: list[dict[str, Any]] = page.evaluate(
        """() => [...document.querySelectorAll(".st-key-page *")].filter(element =>
            element.checkVisibility() && !element.closest("[data-testid=stImageContainer]") &&
            !element.closest(":disabled") &&  // WCAG 1.4.3 leaves them out
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
    upload(page, file("mountains.png", PLAIN))
    expect_answer(page, "Not a meme", "mountains.png")
    blocked = page.evaluate("fetch('https://example.org').then(() => 'reached', () => 'blocked')")
    assert blocked == "blocked"
    assert len([text for text in wrong if "example.org" not in text]) == 0, wrong
    page.close()
