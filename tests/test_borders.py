import numpy as np
import pytest
from draw import heavy_line
from numpy.typing import NDArray
from pictures import ROOT, encode, noise
from PIL import Image, ImageDraw, ImageFont, ImageOps

from borders import GRID_SIDE, content_box
from images import open_picture, to_square
from model import NOT_MEME, Classifier

SKY = np.array([120.0, 170.0, 225.0])
Y, X = np.mgrid[0:700, 0:700, 0:1][:2] / 700  # of shape (700, 700, 1), from 0 to 1
BACKGROUNDS: dict[str, NDArray[np.float64]] = {
    "plain": SKY + 0 * Y,
    "white": 255 + 0 * SKY * Y,
    "black": 0 * SKY * Y,
    "gentle gradient": SKY - 40 * Y + 0 * X,
    "steep gradient": SKY - np.array([100.0, 140.0, 200.0]) * Y + 0 * X,
    "gradient from the left": SKY + 0 * Y - 24 * X,
    "radial gradient": SKY - 80 * ((X - 0.5) ** 2 + (Y - 0.5) ** 2),
    "grain": SKY + np.random.default_rng(0).normal(0, 4, (700, 700, 3)),
}


def is_near(box: tuple[int, int, int, int] | None, expected: tuple[int, int, int, int], size: tuple[int, int]) -> bool:
    """Whether a box is the expected one within a point of the grid on which borders are detected."""
    assert box
    points = zip(box, expected, size * 2, strict=True)
    return all(abs(side - other) <= length / GRID_SIDE + 1 for side, other, length in points)


def captioned(background: str, top: str = "", bottom: str = "", width: int = 660, gap: int = 26) -> Image.Image:
    """White capitals with a black outline on a plain background, and a disc in the middle."""
    picture = Image.fromarray(BACKGROUNDS[background].clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(picture).ellipse((250, 250, 450, 450), "sienna")
    for text, y in ((top, gap), (bottom, 700 - 80 - gap)):
        if text:
            line = heavy_line(text, width, 80).resize((width, 80))
            picture.paste(line, ((700 - width) // 2, y), line)
    return picture


@pytest.mark.parametrize("colour", ["black", "white", "teal"])
@pytest.mark.parametrize("sides", [(40, 40, 40, 40), (0, 90, 0, 90), (120, 0, 120, 0), (0, 60, 0, 0), (0, 5, 0, 300)])
def test_a_plain_margin_is_a_border(sides: tuple[int, int, int, int], colour: str) -> None:
    whole = ImageOps.expand(noise(240, 200), sides, colour)
    stored = open_picture(encode(whole, "JPEG"))  # its borders are not quite of one colour
    assert is_near(content_box(stored), (sides[0], sides[1], sides[0] + 240, sides[1] + 200), whole.size)
    cropped, alone = (np.asarray(to_square(one, 64), int) for one in (stored, noise(240, 200)))
    assert np.abs(cropped - alone).mean() < 12


def test_the_status_bar_of_a_phone_belongs_to_the_border() -> None:
    screen = ImageOps.expand(noise(240, 240), (0, 120, 0, 120), "black")
    draw = ImageDraw.Draw(screen)
    draw.text((8, 6), "12:34", "white")
    draw.rectangle((210, 8, 230, 16), outline="white")
    draw.ellipse((115, 462, 125, 472), outline="white")
    assert content_box(screen) == (0, 120, 240, 360)


def test_a_caption_at_the_edge_of_a_wide_margin_is_no_status_bar(classifier: Classifier) -> None:
    whole = ImageOps.expand(open_picture(ROOT / "examples" / "mountains.jpg"), (0, 160, 0, 0), "white")
    assert classifier.predict([whole])[0].verdict == NOT_MEME
    caption = ImageFont.load_default(24)
    ImageDraw.Draw(whole).text((20, 8), "when ur mom comes home early", "black", caption)
    assert content_box(whole) is None
    assert classifier.predict([whole])[0].meme_probability > 0.5


def with_margin_caption(y: int) -> Image.Image:
    """A picture below a white margin with one line of text at this height."""
    whole = ImageOps.expand(noise(240, 200), (0, 60, 0, 0), "white")
    ImageDraw.Draw(whole).text((30, y), "nobody at all, really:", "black", font_size=18)
    return whole


@pytest.mark.parametrize(
    "picture",
    [
        noise(240, 200),
        Image.new("RGB", (240, 200), "white"),  # a margin without content
        with_margin_caption(3),
        with_margin_caption(25),
        ImageOps.expand(noise(240, 200), (0, 2, 0, 2), "black"),  # too narrow to matter
        ImageOps.expand(noise(14, 14), (60, 60, 60, 60), "black"),  # too small to be classified alone
        Image.linear_gradient("L").convert("RGB"),  # no straight edge
    ],
)
def test_text_and_gradients_are_no_borders(picture: Image.Image) -> None:
    assert content_box(picture) is None


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize(
    ("top", "bottom"), [("ONE DOES NOT SIMPLY", "LEAVE THE HOUSE"), ("ONE DOES NOT SIMPLY", ""), ("", "FIXED THE BUG")]
)
def test_the_sky_above_a_caption_is_no_border(background: str, top: str, bottom: str) -> None:
    picture = captioned(background, top, bottom)
    assert content_box(picture) is None
    assert content_box(open_picture(encode(picture, "JPEG"))) is None


@pytest.mark.parametrize("gap", [10, 40, 90])
@pytest.mark.parametrize("width", [400, 550, 680])
def test_captions_of_every_width_and_height_are_no_content_edge(width: int, gap: int) -> None:
    assert content_box(captioned("plain", "TELL ME MORE ABOUT IT", "HE SAID", width, gap)) is None


def test_one_line_of_a_caption_below_the_other() -> None:
    picture = captioned("gentle gradient", "ONE DOES NOT SIMPLY")
    line = heavy_line("WALK INTO THE OFFICE", 660, 80)
    picture.paste(line, (20, 112), line)
    assert content_box(picture) is None


@pytest.mark.parametrize("colour", ["black", "white"])
@pytest.mark.parametrize("sides", [(0, 90, 0, 90), (60, 60, 60, 60), (120, 0, 120, 0), (0, 70, 0, 0)])
def test_a_border_around_a_captioned_picture_is_cropped(sides: tuple[int, int, int, int], colour: str) -> None:
    whole = ImageOps.expand(captioned("plain", "ONE DOES NOT SIMPLY", "LEAVE THE HOUSE"), sides, colour)
    assert is_near(content_box(whole), (sides[0], sides[1], sides[0] + 700, sides[1] + 700), whole.size)
