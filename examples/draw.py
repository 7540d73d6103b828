"""Draw the pictures that this project ships: python examples/draw.py

Nothing in them comes from anywhere else. Writes the examples beside this file and background.png.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HERE = Path(__file__).parent
BOLD = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold"))
SERIF = font_manager.findfont(font_manager.FontProperties(family="DejaVu Serif"))
SIZE = (720, 540)  # pixels


def background() -> Image.Image:
    """A heatmap's cells at night: flat tiles, dark enough for text, light where evidence would be."""
    columns, rows, tile = 24, 14, 80
    y, x = np.mgrid[0:rows, 0:columns]
    glow = np.exp(-((x - 20) ** 2 / 22 + (y - 2.5) ** 2 / 9)) + 0.8 * np.exp(-((x - 2) ** 2 / 16 + (y - 11.5) ** 2 / 7))
    glow = glow + 0.05 * np.random.default_rng(7).standard_normal(glow.shape)
    dark, cool, warm = np.array([16, 22, 42]), np.array([28, 74, 120]), np.array([196, 98, 40])
    image = Image.new("RGB", (columns * tile, rows * tile), (11, 16, 32))
    draw = ImageDraw.Draw(image)
    for row in range(rows):
        for column in range(columns):
            heat = float(glow[row, column].clip(0, 1))
            colour = dark + (cool - dark) * min(1, 2 * heat) + (warm - cool) * max(0, 2 * heat - 1)
            left, top = column * tile, row * tile
            draw.rounded_rectangle((left + 2, top + 2, left + tile - 3, top + tile - 3), 10, tuple(colour.astype(int)))
    return image.crop((0, 0, 1920, 1080))


def mountains() -> Image.Image:
    """A range at dusk, with film grain: our stand-in for a photograph."""
    noise = np.random.default_rng(3)
    width, height = SIZE
    y, x = np.mgrid[0:height, 0:width] / height
    sky = np.stack([250 - 130 * (0.6 - y), 170 - 60 * (0.6 - y), 120 + 120 * (0.6 - y)], 2)
    sun = np.exp(-(((x - 0.95) ** 2 + (y - 0.42) ** 2) / 0.012))
    image = sky + sun[..., None] * np.array([60, 80, 60])
    for depth, (base, roughness) in enumerate(((0.5, 0.05), (0.6, 0.07), (0.72, 0.08), (0.85, 0.06))):
        ridge = base + sum(
            roughness / octave * np.sin(x[0] * octave * 5 + noise.uniform(0, 6)) for octave in (1, 2, 4, 9, 21, 43)
        )
        slope = (y > ridge)[..., None]
        haze = 0.75 - 0.22 * depth
        light = 1 + 0.25 * np.sin(40 * (y - ridge) + 25 * x)[..., None]
        rock = np.array([40, 48, 66]) * light * (1 - haze) + np.array([205, 150, 140]) * haze
        image = np.where(slope, rock, image)
    image = image + noise.normal(0, 6, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def cat() -> Image.Image:
    """A cat that looks straight at you."""
    image = Image.new("RGB", SIZE, (126, 160, 150))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 400, 720, 540), fill=(139, 101, 74))
    fur, dark, pink = (226, 146, 70), (150, 84, 36), (240, 170, 160)
    draw.ellipse((190, 330, 530, 700), fill=fur)
    draw.polygon([(205, 210), (225, 60), (330, 140)], fill=fur)
    draw.polygon([(515, 210), (495, 60), (390, 140)], fill=fur)
    draw.polygon([(228, 170), (238, 92), (298, 138)], fill=pink)
    draw.polygon([(492, 170), (482, 92), (422, 138)], fill=pink)
    draw.ellipse((195, 110, 525, 410), fill=fur)
    for left in (335, 355, 375):
        draw.line((left, 118, left, 165), fill=dark, width=9)
    for centre in (290, 430):
        draw.ellipse((centre - 42, 200, centre + 42, 276), fill=(236, 232, 180))
        draw.ellipse((centre - 12, 202, centre + 12, 274), fill=(20, 20, 20))
        draw.ellipse((centre + 2, 214, centre + 12, 226), fill="white")
        draw.line((centre - 46, 198, centre + 46, 204 if centre == 290 else 190), fill=dark, width=8)
    draw.polygon([(342, 300), (378, 300), (360, 322)], fill=pink)
    draw.arc((318, 310, 360, 356), 0, 120, fill=dark, width=5)
    draw.arc((360, 310, 402, 356), 60, 180, fill=dark, width=5)
    for rise in (-18, 0, 18):
        draw.line((320, 330, 190, 322 + rise), fill=(250, 240, 230), width=3)
        draw.line((400, 330, 530, 322 + rise), fill=(250, 240, 230), width=3)
    return grain(image.filter(ImageFilter.GaussianBlur(1)))


def captioned(picture: Image.Image, top: str, bottom: str) -> Image.Image:
    """The classic: heavy white capitals with a black rim, above and below."""
    image = picture.copy()
    for text, at in ((top, 12), (bottom, image.height - 92)):
        line = heavy_line(text, image.width - 40, 80)
        image.paste(line, ((image.width - line.width) // 2, at), line)
    return image


def heavy_line(text: str, most_width: int, height: int) -> Image.Image:
    """One line of white capitals with a black rim, squeezed as headline type is."""
    font = ImageFont.truetype(BOLD, 72)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, stroke_width=6))
    line = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(line).text((-left, -top), text, "white", font, stroke_width=6, stroke_fill="black")
    return line.resize((min(most_width, int(line.width * 0.72)), height), Image.Resampling.LANCZOS)


def cat_meme() -> Image.Image:
    return captioned(cat(), "I FIXED ONE BUG", "NOW THERE ARE SEVEN")


def labelled_cat() -> Image.Image:
    """One word on a cat: a joke to some, a caption to others. Meant to be a doubtful case."""
    return labelled(cat(), "Mondays", 44, (360, 500), rim=3)


def motivation() -> Image.Image:
    """Two words above mountains, as on a calendar. Meant to be a doubtful case of another kind."""
    return labelled(mountains(), "Keep going", 60, (360, 90))


def labelled(picture: Image.Image, text: str, size: int, at: tuple[int, int], rim: int = 0) -> Image.Image:
    """White bold text, centred at a point."""
    image = picture.copy()
    font = ImageFont.truetype(BOLD, size)
    ImageDraw.Draw(image).text(at, text, "white", font, anchor="mm", stroke_width=rim, stroke_fill="black")
    return image


def mountain_meme() -> Image.Image:
    """A white bar with a caption over the same mountains that are no meme without it."""
    scene = mountains()
    image = Image.new("RGB", (720, 690), "white")
    image.paste(scene, (0, 150))
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 36)
    draw = ImageDraw.Draw(image)
    draw.text((24, 22), "When you said you would only check\none e-mail before the hike", "black", font, spacing=10)
    return image


def choice_meme() -> Image.Image:
    """Two panels, a refusal and an approval, with what they are about beside them."""
    image = Image.new("RGB", (720, 640), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(BOLD, 40)
    for top, wall, text, smiles in (
        (0, (236, 178, 84), "READING\nTHE\nMANUAL", False),
        (320, (120, 184, 150), "PRESSING\nEVERY\nBUTTON", True),
    ):
        draw.rectangle((0, top, 356, top + 316), fill=wall)
        draw.ellipse((100, top + 190, 260, top + 420), fill=(60, 70, 130))
        draw.rectangle((0, top + 317, 720, 640), fill="white")
        draw.ellipse((110, top + 40, 250, top + 210), fill=(236, 196, 160), outline="black", width=4)
        draw.pieslice((104, top + 26, 256, top + 170), 180, 360, fill=(70, 44, 30))
        for eye in (150, 206):
            if smiles:
                draw.arc((eye - 14, top + 108, eye + 14, top + 136), 180, 360, fill="black", width=5)
            else:
                draw.line((eye - 14, top + 118, eye + 14, top + 124), fill="black", width=5)
        mouth = (145, top + 140, 215, top + 186) if smiles else (150, top + 164, 210, top + 200)
        draw.arc(mouth, 0 if smiles else 180, 180 if smiles else 360, fill="black", width=5)
        hand = (300, top + 60) if smiles else (310, top + 130)
        draw.line((230, top + 240, *hand), fill=(60, 70, 130), width=34)
        draw.ellipse(
            (hand[0] - 26, hand[1] - 30, hand[0] + 26, hand[1] + 26), fill=(236, 196, 160), outline="black", width=3
        )
        draw.multiline_text((540, top + 160), text, "black", font, anchor="mm", align="center", spacing=12)
    draw.line((0, 318, 720, 318), fill="black", width=5)
    draw.line((358, 0, 358, 640), fill="black", width=5)
    return image


def chart() -> Image.Image:
    figure = Figure(figsize=(7.2, 5.4), dpi=100)
    axes = figure.add_subplot()
    axes.bar(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"], [42, 38, 51, 47, 60, 83, 76], color="#3b6ea5")
    axes.set_title("Visitors of the botanical garden, second week of May")
    axes.set_ylabel("Visitors (hundreds)")
    axes.grid(axis="y", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def poster() -> Image.Image:
    """A concert poster: much text, no joke."""
    image = Image.new("RGB", (540, 760), (24, 32, 58))
    draw = ImageDraw.Draw(image)
    for radius in range(210, 20, -24):
        shade = 90 + (210 - radius) // 2
        draw.ellipse((270 - radius, 320 - radius, 270 + radius, 320 + radius), outline=(shade + 60, shade, 60), width=9)
    draw.rectangle((258, 330, 282, 560), fill=(230, 190, 110))
    draw.ellipse((196, 500, 290, 570), fill=(230, 190, 110))
    for text, at, size, font in (
        ("Chamber Music Festival", 46, 36, SERIF),
        ("STRING QUARTETS BY CANDLELIGHT", 96, 21, BOLD),
        ("12 – 16 June", 610, 40, SERIF),
        ("Old Town Hall · doors open at 19:30", 668, 22, SERIF),
        ("Tickets at the box office and at the door", 704, 19, SERIF),
    ):
        draw.text((270, at), text, (244, 232, 206), ImageFont.truetype(font, size), anchor="mm")
    return image


def grain(image: Image.Image) -> Image.Image:
    pixels: NDArray[np.float64] = np.asarray(image) + np.random.default_rng(5).normal(0, 5, (*image.size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


EXAMPLES: dict[str, Callable[[], Image.Image]] = {
    "cat_meme": cat_meme,
    "choice_meme": choice_meme,
    "labelled_cat": labelled_cat,
    "motivation": motivation,
    "mountain_meme": mountain_meme,
    "mountains": mountains,
    "bar_chart": chart,
    "concert_poster": poster,
}


def main() -> None:
    background().save(HERE.parent / "background.png", optimize=True)
    for name, draw in EXAMPLES.items():
        draw().save(HERE / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
