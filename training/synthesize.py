"""Draw labelled pictures to train on beside real ones: python -m training.synthesize PICTURES... --out DATA_DIR

From the same pictures (photographs, art, blank meme templates) come memes and posters, cards, screenshots,
documents, comics: so the picture itself says nothing about the label, and neither does text in it. What
remains to be learnt is how memes set their text. The words come from fortune files, which Debian has in
many languages (packages `fortunes`, `fortunes-de`, ...), the letters from the fonts that are installed.
"""

import argparse
import csv
import itertools
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import matplotlib
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from images import BadImage, find_pictures, open_picture
from model import MEME, NOT_MEME

SIDE = 480  # pixels of the longest side while drawing, about
SAVED_SIDE = 264  # pixels of the longest side when saved
QUALITY = 70
SEED = 0
CAPTIONS_FILE = "captions.csv"

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]  # left, top, right, bottom; shares of the page's width and height
Families = tuple[str, ...]  # parts of font files' names

WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)
TONES = ((0, 120), (0, 255), (150, 255))  # ranges of colour channels: dark, any, light
ANY: Families = ("",)
PLAIN = ("Liberation", "DejaVuSans", "Roboto", "OpenSans", "Lato", "Carlito", "NotoSans-", "Inter", "Cabin")
CONDENSED = ("Bebas", "Condensed-Bold", "YanoneKaffeesatz-Bold", "Narrow-Bold", "LeagueSpartan", "Ubuntu-Title")
HAND = ("Comic", "Humor", "Tomson", "dkg", "Andika", "StayPuft", "Cherry")
ORNATE = ("Dancing", "Kaushan", "Lobster", "Kristi", "Leckerli", "Isabella", "Z003", "Comfortaa", "Quicksand")
SERIF = ("Serif", "EBGaramond", "LinLibertine", "Caladea", "Vollkorn", "OldStandard", "Quattrocento", "P052", "C059")
WORLD = ("DejaVuSans.", "Devanagari", "Thai", "Hebrew", "Arabic", "Naskh", "Nanum", "takao", "wqy", "CJK")
MONO = ("Mono", "Courier", "Hack", "JetBrains", "OCR", "gnutypewriter")
GREETINGS = (
    "Happy Birthday", "Merry Christmas", "Happy New Year", "Thank you", "Congratulations", "Get well soon", "Welcome",
    "With love", "You're invited", "Save the date", "Feliz cumpleaños", "Feliz Navidad", "Bom dia", "Joyeux Noël",
    "Feliz aniversário", "Alles Gute", "Frohe Weihnachten", "Buon compleanno", "Wszystkiego najlepszego",
    "С днём рождения", "С Новым годом", "С 8 Марта", "Happy Mother's Day", "Happy Diwali", "Eid Mubarak", "新年快樂",
)  # fmt: skip
OFFERS = ("SALE", "50% OFF", "-30%", "NEW", "BUY NOW", "FREE", "$9.99", "19,99 €", "2 for 1", "Sign up", "Read more")
# The first article of the Universal Declaration of Human Rights, for scripts that fortune files lack.
DECLARATION = (
    "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق وقد وهبوا عقلا وضميرا",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है",
    "すべての人間は生れながらにして自由でありかつ尊厳と権利とについて平等である",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền",
    "人人生而自由在尊严和权利上一律平等他们赋有理性和良心并应以兄弟关系的精神相对待",
)
SPEAKERS = ("Me", "Her", "Him", "Mom", "Nobody", "Boss", "Yo", "Mi mamá", "Nadie", "Я", "Он", "Eu", "Everyone")


@dataclass(frozen=True, slots=True)
class Letters:
    """How to set a text; `largest` is a share of the page's height, `squeeze` narrows the letters."""

    families: Families = PLAIN
    fill: Colour = BLACK
    outline: Colour | None = None
    glow: Colour | None = None  # a soft shadow in a dark colour, a shine in a light one
    align: str = "center"
    valign: str = "middle"
    largest: float = 0.12
    squeeze: float = 1.0


@dataclass(frozen=True, slots=True)
class Design:
    """A kind of designed page: grounds and stacks of blocks to choose from; probabilities of ornaments."""

    ratios: tuple[float, ...]  # width to height
    grounds: tuple[str, ...]  # picture, dark picture, gradient, paper, night, colour
    stacks: tuple[str, ...]  # blocks from top to bottom, methods of `Artist`, or gap
    families: tuple[Families, ...]
    columns: tuple[int, ...] = (1,)
    picture_aside: float = 0.0
    badge: float = 0.0
    border: float = 0.0
    confetti: float = 0.0
    tilt: float = 0.0


DESIGNS = {
    "poster__poster": (3, Design(
        (0.67, 0.71, 1.0, 1.6), ("picture", "picture", "dark picture", "gradient"),
        ("gap gap title line credits", "line title gap gap gap credits", "gap title title gap line",
         "title figure line", "title gap gap gap line", "emblem gap gap title",
         "bar gap gap gap title credits", "bar title gap gap line"),
        (ANY, ANY, ORNATE, SERIF, CONDENSED, PLAIN), border=0.1, badge=0.1)),
    "poster__advert": (1.5, Design(
        (1.0, 1.9, 0.56, 3.2, 0.8), ("gradient", "colour", "paper", "picture"),
        ("title text button", "line title button", "title line figure button"),
        (PLAIN, CONDENSED, ORNATE, ANY), picture_aside=0.7, badge=0.6)),
    "card__quote": (3, Design(
        (1.0, 0.8, 0.56, 1.8, 1.3), ("dark picture", "dark picture", "gradient", "colour", "paper"),
        ("gap quote quote line gap", "quote quote quote line", "gap gap quote quote line", "gap quote gap"),
        (SERIF, ORNATE, ORNATE, PLAIN, CONDENSED, ANY), border=0.3)),
    "card__greeting": (1.5, Design(
        (0.7, 1.0, 1.4), ("gradient", "colour", "paper", "picture"),
        ("gap greeting line", "figure greeting line", "greeting gap text", "gap gap greeting"),
        (ORNATE, ORNATE, SERIF, ANY), border=0.4, confetti=0.5)),
    "card__game": (1.5, Design(
        (0.71, 0.66, 0.71, 1.5), ("paper", "colour", "gradient"),
        ("line figure figure text", "line figure text text", "figure line text", "line text figure line"),
        (SERIF, SERIF, ORNATE, CONDENSED), border=0.9, badge=0.5)),
    "card__banner": (1.5, Design(
        (1.9, 1.9, 1.4, 2.6, 1.0), ("gradient", "gradient", "colour", "paper", "dark picture"),
        ("line title line", "title title line", "gap title line gap", "line title text"),
        (PLAIN, PLAIN, SERIF, CONDENSED, ORNATE), picture_aside=0.6, border=0.2)),
    "graphic__logo": (1, Design(
        (1.0, 1.0, 1.5, 2.4), ("paper", "paper", "night", "colour"),
        ("emblem title", "emblem title line", "gap title gap", "emblem", "title emblem"),
        (ANY, ANY, SERIF, CONDENSED, ORNATE), picture_aside=0.1)),
    "chart__diagram": (1, Design(
        (1.0, 1.4, 1.8), ("paper",),
        ("diagram diagram", "title diagram diagram", "diagram diagram diagram", "line diagram diagram text"),
        (PLAIN, PLAIN, HAND))),
    "screenshot__web": (1.5, Design(
        (1.6, 1.3, 0.5, 0.8), ("paper", "paper", "night"),
        ("bar title figure text text", "bar figure text figure text", "bar title text text text text",
         "bar line table text"),
        (PLAIN, PLAIN, SERIF), columns=(1, 1, 2, 3), picture_aside=0.2)),
    "screenshot__app": (1.5, Design(
        (0.46, 0.5, 0.56, 0.75), ("paper", "paper", "night"),
        ("bar row row row row row row row row", "bar line field field field field button",
         "bar row figure line row figure", "bar figure line row row row tabs", "bar row row row row gap tabs"),
        (PLAIN,))),
    "document__page": (1.5, Design(
        (0.71, 0.77, 0.62, 1.41), ("paper",),
        ("line title text text text", "text text text text", "title text figure text", "text table text text",
         "line table table line"),
        (SERIF, SERIF, PLAIN, MONO, HAND), columns=(1, 1, 2), tilt=0.35)),
    "document__slide": (1.5, Design(
        (1.78, 1.33, 1.33, 0.75), ("paper", "paper", "gradient", "night", "colour"),
        ("title points points points", "bar points points", "title figure line", "title text points", "line title"),
        (PLAIN, PLAIN, SERIF, HAND), picture_aside=0.4)),
}  # fmt: skip


@cache
def fonts(families: Families) -> tuple[Path, ...]:
    """The upright fonts of some families, the system's and Matplotlib's; all of them if none is there."""
    folders = (Path("/usr/share/fonts"), Path(matplotlib.get_data_path()) / "fonts")
    found = [p for folder in folders for p in sorted(folder.rglob("*.[to]t[fc]"))]
    found = [p for p in found if not re.search("Italic|Oblique|Light|Thin|Symbol|Emoji|Math|Ornament", p.name)]
    return tuple(p for p in found if any(family.lower() in p.name.lower() for family in families)) or tuple(found)


@cache
def can_write(font: Path, letters: str) -> bool:
    """Whether a font has glyphs of its own for some letters."""
    face = ImageFont.truetype(font, 20)
    missing = bytes(face.getmask("\uffff"))
    return all(bytes(face.getmask(letter)) not in (missing, b"") for letter in letters)


class Artist:
    """One random draw of a picture.

    Args:
        random_generator: whence every choice comes.
        pictures: files to draw on, any of which may also stand alone as not a meme.
        templates: more files to draw on, which never stand alone: people disagree whether they are memes.
        texts: sentences to write.
    """

    def __init__(
        self, random_generator: random.Random, pictures: list[Path], templates: list[Path], texts: list[str]
    ) -> None:
        self.random = random_generator
        self.pictures = pictures
        self.templates = templates
        self.texts = texts
        self.chosen_fonts: dict[Families, Path] = {}
        self.written: list[tuple[Image.Image, Box]] = []  # pages, and where there is ink upon them
        self.memes: dict[str, tuple[float, Callable[[], Image.Image]]] = {
            "macro": (3, self.macro),
            "caption-bar": (4, self.caption_bar),
            "labels": (2, self.labels),
            "panels": (2.5, self.panels),
            "demotivational": (0.5, self.demotivational),
            "caption-inside": (2.5, self.caption_inside),
            "fried": (0.5, self.fried),
        }
        self.others: dict[str, tuple[float, Callable[[], Image.Image]]] = {
            "photo__stamped": (2, self.stamped),
            "photo__plain": (1.5, self.plain),
            "comic__panels": (2, self.comic),
        } | {name: (weight, partial(self.designed, design)) for name, (weight, design) in DESIGNS.items()}

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def colour(self, low: int = 0, high: int = 255) -> Colour:
        return (self.random.randint(low, high), self.random.randint(low, high), self.random.randint(low, high))

    def vivid(self) -> Colour:
        return self.random.choice(
            ((200, 30, 40), (250, 200, 0), (30, 80, 190), (20, 130, 80), (120, 40, 150), self.colour())
        )

    def words(self, low: int, high: int) -> str:
        """So many words of one text; so many triples of letters where a script has no spaces."""
        count = self.random.randint(low, high)
        text = self.random.choice(DECLARATION if self.chance(0.12) else self.texts)
        if " " not in text[:40]:
            return text[: 3 * count]
        start = self.random.randrange(max(1, len(text.split()) - count + 1))
        return " ".join(text.split()[start : start + count])

    def picture(self, width: int, height: int, *, templates: bool = True) -> Image.Image:
        """A picture that fills a size in pixels; at height 0, one of that width in about its own proportions."""
        if self.chance(0.06):
            return self.cartoon(width, height or int(width / self.random.uniform(0.65, 1.9)))
        from_templates = templates and self.templates and self.chance(0.4)
        source = open_picture(self.random.choice(self.templates if from_templates else self.pictures))
        ratio = min(1.9, max(0.65, source.width / source.height))
        size = (max(1, width), max(1, height or int(width / ratio)))
        return ImageOps.fit(source, size, Image.Resampling.BICUBIC)

    def cartoon(self, width: int, height: int) -> Image.Image:
        """A drawn scene: flat ground and sky, one to three outlined figures."""
        line_art = self.chance(0.3)
        sky, earth, *tints = (WHITE, WHITE, WHITE, WHITE, WHITE) if line_art else [self.colour(90) for _ in range(5)]
        scene = Image.new("RGB", (width, height), sky)
        draw = ImageDraw.Draw(scene)
        pen = max(1, min(width, height) // 90)
        horizon = height * self.random.uniform(0.5, 0.9)
        draw.rectangle((-9, horizon, width + 9, height + 9), earth, BLACK if self.chance(0.5) else None, pen)
        for _ in range(self.random.randint(1, 3)):
            size = min(width, height) * self.random.uniform(0.12, 0.3)
            x, y = self.random.uniform(size, max(size, width - size)), horizon - size * self.random.uniform(0.2, 2)
            skin, clothes = self.random.choice(tints), self.random.choice(tints)
            draw.ellipse((x - size * 0.6, y + size * 0.5, x + size * 0.6, y + size * 2.4), clothes, BLACK, pen)
            draw.ellipse((x - size, y - size, x + size, y + size), skin, BLACK, pen)
            for side in (-0.4, 0.4):
                eye, pupil = size * self.random.uniform(0.12, 0.3), size * 0.1
                at = x + side * size
                draw.ellipse((at - eye, y - eye, at + eye, y + eye), WHITE, BLACK, pen)
                draw.ellipse((at - pupil, y - pupil, at + pupil, y + pupil), BLACK)
            mouth = (x - size * 0.4, y + size * 0.3, x + size * 0.4, y + size * 0.7)
            draw.arc(mouth, self.random.choice((0, 180)), self.random.choice((180, 360)), BLACK, pen + 1)
        return scene

    def write(self, page: Image.Image, text: str, box: Box, letters: Letters) -> None:
        """Write text into a box, as large as it fits."""
        left, right = int(box[0] * page.width), int(box[2] * page.width)
        top, height = int(box[1] * page.height), int((box[3] - box[1]) * page.height)
        width = int((right - left) / letters.squeeze)
        if width < 8 or height < 6:
            return
        file, size = self.font(letters.families, text), max(7, int(letters.largest * page.height))
        while True:
            font = ImageFont.truetype(file, size)
            lines = wrap(text, font, width)
            line_height = int(size * 1.18)
            if size <= 7 or (len(lines) * line_height <= height and max(map(font.getlength, lines)) <= width):
                break
            size = max(7, int(size * 0.86))
        lines = lines[: max(1, height // line_height)]
        layer = Image.new("RGBA", (width, height), (0, 0, 0, 0))
        draw = ImageDraw.Draw(layer)
        y = {"top": 0.0, "middle": 0.5, "bottom": 1.0}[letters.valign] * (height - len(lines) * line_height)
        stroke = max(1, round(size / 14)) if letters.outline is not None else 0
        for line in lines:
            x = {"left": 0.0, "center": 0.5, "right": 1.0}[letters.align] * (width - font.getlength(line))
            draw.text((x, y), line, letters.fill, font, stroke_width=stroke, stroke_fill=letters.outline)
            y += line_height
        layer = layer.resize((right - left, height), Image.Resampling.BILINEAR)
        if letters.glow is not None:
            halo = layer.getchannel("A").filter(ImageFilter.GaussianBlur(size / 8)).point(lambda alpha: 2 * alpha)
            page.paste(letters.glow, (left, top), halo)
        page.paste(layer, (left, top), layer)
        if ink := layer.getbbox():
            first, highest, last, lowest = ink
            at = (left + first) / page.width, (top + highest) / page.height
            self.written.append((page, (*at, (left + last) / page.width, (top + lowest) / page.height)))

    def font(self, families: Families, text: str) -> Path:
        """A font of the family that can write the text, else any that can; the same all over a picture."""
        rarest = "".join(sorted({c for c in text if c.isalpha()}, reverse=True)[:2])
        known = self.chosen_fonts.get(families)
        if known is None or not can_write(known, rarest):
            some = self.random.sample(fonts(families), min(12, len(fonts(families))))
            some += self.random.sample(fonts(WORLD), len(fonts(WORLD)))
            self.chosen_fonts[families] = next((font for font in some if can_write(font, rarest)), some[0])
        return self.chosen_fonts[families]

    # Memes

    def macro(self) -> Image.Image:
        """Capitals with an outline at the top and the bottom."""
        page = self.picture(SIDE, 0)
        fill, outline = self.random.choice(((WHITE, BLACK),) * 6 + ((BLACK, WHITE), ((255, 230, 0), BLACK)))
        letters = Letters(
            self.random.choice((CONDENSED, CONDENSED, CONDENSED, PLAIN, HAND)),
            fill,
            outline,
            largest=self.random.uniform(0.08, 0.16),
            squeeze=self.random.choice((0.7, 0.8, 1.0)),
        )
        share, upper = self.random.uniform(0.14, 0.3), self.chance(0.8)
        for place in self.random.choice((("top", "bottom"), ("top", "bottom"), ("top",), ("bottom",))):
            text = self.words(1, 9)
            box = (0.02, 0.01, 0.98, share) if place == "top" else (0.02, 1 - share, 0.98, 0.99)
            self.write(page, text.upper() if upper else text, box, replace(letters, valign=place))
        return page

    def caption_bar(self) -> Image.Image:
        """A caption on a plain bar over or below a picture."""
        picture = self.panels(captioned=False) if self.chance(0.15) else self.picture(SIDE, 0)
        paper, ink = self.random.choice(((WHITE, BLACK),) * 5 + ((BLACK, WHITE), ((21, 32, 43), WHITE)))
        bar = int(picture.height * self.random.uniform(0.12, 0.45))
        at_top = self.chance(0.9)
        page = Image.new("RGB", (picture.width, picture.height + bar), paper)
        page.paste(picture, (0, bar if at_top else 0))
        text = self.words(4, 26)
        if self.chance(0.35):
            text = "\n".join(f"{self.random.choice(SPEAKERS)}: {self.words(2, 8)}" for _ in range(2))
        families = self.random.choice((PLAIN, PLAIN, PLAIN, SERIF, HAND, CONDENSED))
        align = self.random.choice(("left", "left", "center"))
        share = bar / page.height
        box = (0.02, 0.01, 0.98, share - 0.01) if at_top else (0.02, 1.01 - share, 0.98, 0.99)
        self.write(page, text, box, Letters(families, ink, align=align, largest=self.random.uniform(0.04, 0.09)))
        return page

    def labels(self) -> Image.Image:
        """Labelled objects: short words here and there in a picture."""
        page = self.picture(SIDE, 0)
        fill, outline = self.random.choice(((WHITE, BLACK), (WHITE, BLACK), (BLACK, WHITE), (BLACK, None)))
        size = self.random.uniform(0.05, 0.11)
        letters = Letters(self.random.choice((PLAIN, PLAIN, CONDENSED, HAND)), fill, outline, largest=size)
        count = self.random.randint(2, 4)
        for index in range(count):
            x, y = self.random.uniform(0.02, 0.55), (index + self.random.uniform(0.1, 0.7)) / count
            self.write(page, self.words(1, 4), (x, y, x + 0.42, min(1, y + 2.4 * size)), letters)
        return page

    def panels(self, *, captioned: bool = True) -> Image.Image:
        """Pictures in a grid, with words upon or beside each."""
        rows = self.random.randint(1, 4)
        beside = captioned and self.chance(0.4)
        columns = 2 if beside or (rows < 3 and self.chance(0.6)) else 1
        cell_w = (SIDE if rows < 3 else int(SIDE * 0.75)) // columns
        cell_h = int(cell_w * self.random.uniform(0.5, 0.95))
        paper = self.random.choice((WHITE, WHITE, BLACK))
        page = Image.new("RGB", (cell_w * columns, cell_h * rows), paper)
        families = self.random.choice((PLAIN, PLAIN, CONDENSED, HAND, SERIF))
        gap, words_right, low = self.random.choice((0, 0, 3)), self.chance(0.6), self.chance(0.7)
        for row, column in itertools.product(range(rows), range(columns)):
            cell = Image.new("RGB", (cell_w - gap, cell_h - gap), paper)
            if beside and (column == 1) == words_right:
                ink = WHITE if paper == BLACK else BLACK
                self.write(cell, self.words(1, 12), (0.04, 0.04, 0.96, 0.96), Letters(families, ink, largest=0.2))
            else:
                cell = self.picture(*cell.size, templates=captioned)
                if captioned and not beside:
                    box = (0.03, 0.65, 0.97, 0.98) if low else (0.03, 0.02, 0.97, 0.35)
                    self.write(cell, self.words(1, 9), box, Letters(families, WHITE, BLACK, largest=0.18))
            page.paste(cell, (column * cell_w, row * cell_h))
        return page

    def demotivational(self) -> Image.Image:
        """A picture in a black frame above a serif title and a smaller line."""
        picture = self.picture(int(SIDE * 0.8), 0)
        page = Image.new("RGB", (SIDE, int(picture.height * self.random.uniform(1.4, 1.55))), BLACK)
        x, y = int(SIDE * 0.1), int(SIDE * 0.07)
        page.paste(ImageOps.expand(ImageOps.expand(picture, 3, BLACK), 2, WHITE), (x - 5, y - 5))
        top = (y + picture.height) / page.height
        middle = (top + 1) / 2
        title, line = Letters(SERIF, WHITE, largest=0.13), Letters(SERIF, WHITE, largest=0.05)
        self.write(page, self.words(1, 3).upper(), (0.03, top + 0.02, 0.97, middle + 0.02), title)
        self.write(page, self.words(4, 10), (0.04, middle + 0.02, 0.96, 0.98), line)
        return page

    def caption_inside(self) -> Image.Image:
        """A remark in everyday letters upon a picture, with an outline or on a strip."""
        page = self.picture(SIDE, 0)
        y, size = self.random.choice((0.03, 0.05, 0.4, 0.62, 0.7)), self.random.uniform(0.06, 0.12)
        box = (0.03, y, 0.97, y + self.random.uniform(0.15, 0.28))
        if self.chance(0.25):
            paper, ink = self.random.choice(((BLACK, WHITE), (WHITE, BLACK)))
            strip = Image.new("L", (page.width, int((box[3] - y) * page.height)), self.random.choice((130, 170, 255)))
            page.paste(paper, (0, int(y * page.height)), strip)
            letters = Letters(PLAIN, ink, largest=size)
        else:
            fill, outline = self.random.choice(((WHITE, BLACK),) * 4 + (((255, 255, 0), BLACK), (BLACK, WHITE)))
            glow = BLACK if fill != BLACK and self.chance(0.3) else None
            letters = Letters(self.random.choice((PLAIN, PLAIN, PLAIN, HAND, SERIF)), fill, outline, glow, largest=size)
        self.write(page, self.words(2, 14), box, letters)
        return page

    def fried(self) -> Image.Image:
        """One of the others, oversaturated and sharpened."""
        page = self.random.choice((self.macro, self.caption_bar, self.caption_inside, self.labels))()
        page = ImageEnhance.Color(page).enhance(self.random.uniform(2, 4))
        return ImageEnhance.Contrast(page).enhance(self.random.uniform(1.2, 2)).filter(ImageFilter.UnsharpMask(3, 200))

    # Not memes

    def plain(self) -> Image.Image:
        """A picture without words: alone, between bars, or in a collage with others."""
        if self.chance(0.33):
            return self.panels(captioned=False)
        page = self.picture(SIDE, 0, templates=False)
        upper, lower = (int(page.height * self.random.choice((0, 0, 0.04, 0.12, 0.25))) for _ in range(2))
        return ImageOps.expand(page, (0, upper, 0, lower), self.random.choice((WHITE, BLACK)))

    def stamped(self) -> Image.Image:
        """A photograph with a date, a watermark, a credit line, a sign or a name plate."""
        page = self.picture(SIDE, 0, templates=False)
        kind = self.random.choice(("date", "watermark", "credit", "sign", "plate"))
        if kind == "date":
            date = f"{self.random.randint(1, 28)}.{self.random.randint(1, 12)}.{self.random.randint(1994, 2026)}"
            self.write(page, date, (0.6, 0.9, 0.98, 0.98), Letters(MONO, (255, 140, 20), align="right", largest=0.07))
        elif kind == "watermark":
            text, marked = self.words(1, 3), page.copy()
            for y in range(0, 100, self.random.randint(15, 50)):
                self.write(marked, text, (0.03, y / 100, 0.97, y / 100 + 0.14), Letters(ANY, WHITE))
            page = Image.blend(page, marked, self.random.uniform(0.3, 0.7))
        elif kind == "credit":
            letters = Letters(
                fill=self.random.choice((WHITE, BLACK)), align=self.random.choice(("left", "right")), largest=0.04
            )
            self.write(page, "© " + self.words(1, 3), (0.02, 0.94, 0.98, 0.99), letters)
        elif kind == "sign":
            left, top = self.random.uniform(0, 0.5), self.random.uniform(0, 0.7)
            right, bottom = left + self.random.uniform(0.2, 0.45), top + self.random.uniform(0.1, 0.25)
            x, y, end_x, end_y = in_pixels(page, (left, top, right, bottom))
            sign = Image.new("RGB", (end_x - x, end_y - y), self.vivid())
            self.write(sign, self.words(1, 3).upper(), (0.03, 0.05, 0.97, 0.95), Letters(CONDENSED, WHITE, largest=0.8))
            turned = sign.convert("RGBA").rotate(self.random.uniform(-9, 9), expand=True)
            page.paste(turned, (x, y), turned)
        else:
            top, right = self.random.uniform(0.72, 0.84), self.random.uniform(0.5, 1)
            page.paste(self.vivid(), in_pixels(page, (0, top, right, top + 0.12)))
            letters = Letters(PLAIN, WHITE, align="left", largest=0.07)
            self.write(page, self.words(1, 6), (0.02, top, right, top + 0.12), letters)
        return page

    def comic(self) -> Image.Image:
        """A published page: framed panels of drawn pictures, balloons with tails, boxes of narration."""
        ratio = self.random.choice((0.66, 0.75, 1.0, 3.0))
        page = Image.new("RGB", (SIDE, int(SIDE / ratio)) if ratio > 1 else (int(SIDE * ratio), SIDE), WHITE)
        grey, drawn, most_balloons = self.chance(0.3), self.chance(0.6), self.random.choice((0, 1, 2, 2))
        rows = max(1, round(page.height / self.random.uniform(130, 220)))
        for row in range(rows):
            columns = self.random.randint(1, 3) if ratio < 1.5 else self.random.randint(3, 5)
            inner = [page.width * (i + self.random.uniform(-0.12, 0.12)) / columns for i in range(1, columns)]
            top, bottom = page.height * row // rows + 5, page.height * (row + 1) // rows - 5
            for left, right in itertools.pairwise([0, *map(int, inner), page.width]):
                if drawn:
                    panel = self.cartoon(right - left - 10, bottom - top)
                else:
                    panel = self.picture(right - left - 10, bottom - top).filter(ImageFilter.MedianFilter(5))
                    panel = ImageOps.posterize(panel, self.random.randint(2, 4))
                if grey:
                    panel = ImageOps.autocontrast(panel.convert("L")).convert("RGB")
                for _ in range(self.random.randint(0, most_balloons)):
                    self.balloon(panel)
                page.paste(ImageOps.expand(panel, 2, BLACK), (left + 3, top - 2))
        return page

    def balloon(self, panel: Image.Image) -> None:
        """Speech in an ellipse with a tail, or narration in a box."""
        w, h = self.random.uniform(0.4, 0.7), self.random.uniform(0.2, 0.4)
        x, y = self.random.uniform(0, 1 - w), self.random.uniform(0, 0.6 - h)
        box = (x * panel.width, y * panel.height, (x + w) * panel.width, (y + h) * panel.height)
        draw = ImageDraw.Draw(panel)
        if self.chance(0.8):
            middle = (box[0] + box[2]) / 2
            draw.polygon([(middle - 5, box[3] - 4), (middle + 7, box[3] - 4), (box[0] + 9, box[3] + 14)], WHITE, BLACK)
            draw.ellipse(box, WHITE, BLACK)
            x, w, y, h = x + w / 8, w * 0.75, y + h / 6, h * 0.67
        else:
            draw.rectangle(box, (255, 250, 200), BLACK)
        self.write(panel, self.words(3, 12).upper(), (x, y, x + w, y + h), Letters(HAND, largest=0.1))

    def designed(self, design: Design) -> Image.Image:
        """A page of a design: a ground, blocks from top to bottom, perhaps a picture aside and ornaments."""
        ratio = self.random.choice(design.ratios) * self.random.uniform(0.93, 1.07)
        page = self.ground(
            self.random.choice(design.grounds), (SIDE, int(SIDE / ratio)) if ratio > 1 else (int(SIDE * ratio), SIDE)
        )
        self.ornament(page, design)
        margin = self.random.uniform(0.03, 0.12)
        left, right = margin, 1 - margin
        if self.chance(design.picture_aside):
            share, whole = self.random.uniform(0.3, 0.5), self.chance(0.5)
            aside = self.picture(int(share * page.width), page.height if whole else int(page.height * 0.6))
            at_left = self.chance(0.5)
            page.paste(aside, (0 if at_left else page.width - aside.width, (page.height - aside.height) // 2))
            left, right = (share + 0.03, right) if at_left else (left, 0.97 - share)
        light = sum(page.resize((1, 1)).getpixel((0, 0))) > 380  # type: ignore[arg-type]
        ink = self.colour(0, 90) if light else self.random.choice((WHITE, WHITE, self.colour(190)))
        letters = Letters(self.random.choice(design.families), ink, align=self.random.choice(("left", "center")))
        stack = self.random.choice(design.stacks).split()
        columns = self.random.choice(design.columns)
        low = ("line", "bar", "tabs", "credits")
        heights = [self.random.uniform(0.6, 1.4) * (0.5 if name in low else 1) for name in stack]
        blocks: dict[str, Callable[[Image.Image, Box, Letters], None]] = {
            "title": self.title, "line": self.line, "quote": self.quote, "greeting": self.greeting,
            "credits": self.credits, "text": self.text, "points": self.points, "table": self.table,
            "figure": self.figure, "bar": self.bar, "row": self.row, "field": self.field, "button": self.button,
            "tabs": self.tabs, "emblem": self.emblem, "diagram": self.diagram,
        }  # fmt: skip
        y = margin / 2
        for name, height in zip(stack, heights, strict=True):
            bottom = y + (1 - margin) * height / sum(heights)
            side_by_side = columns if name in ("text", "figure", "points") else 1
            step = (right - left) / side_by_side
            for x in (left + column * step for column in range(side_by_side)):
                if name != "gap":
                    blocks[name](page, (x, y, x + step - 0.02, bottom - 0.01), letters)
            y = bottom
        if self.chance(design.badge):
            self.badge(page)
        if self.chance(design.tilt):
            page = page.rotate(self.random.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=self.colour())
            page = ImageEnhance.Brightness(page).enhance(self.random.uniform(0.65, 1))
        return page

    def ornament(self, page: Image.Image, design: Design) -> None:
        """Draw confetti and a border, where the design has them."""
        draw = ImageDraw.Draw(page)
        if self.chance(design.confetti):
            tints = [self.colour(80) for _ in range(3)]
            for _ in range(self.random.randint(10, 60)):
                x, y = self.random.randrange(page.width), self.random.randrange(page.height)
                r = self.random.randint(3, 26)
                draw.ellipse((x - r, y - r, x + r, y + r), self.random.choice(tints))
        if self.chance(design.border):
            inset, width = self.random.randint(2, 20), self.random.randint(1, 9)
            outer = (inset, inset, page.width - inset, page.height - inset)
            draw.rectangle(outer, outline=self.vivid(), width=width)

    def ground(self, kind: str, size: tuple[int, int]) -> Image.Image:
        """What a designed page is printed on."""
        # Big letters on a whole template are a meme, whatever the design.
        if kind == "picture":
            return self.picture(*size, templates=False)
        if kind == "dark picture":
            page = self.picture(*size, templates=False)
            if self.chance(0.4):
                page = page.filter(ImageFilter.GaussianBlur(self.random.uniform(1, 6)))
            return Image.blend(page, Image.new("RGB", size, self.colour(0, 50)), self.random.uniform(0.35, 0.75))
        if kind == "gradient":
            start, end = (Image.new("RGB", size, self.colour(*self.random.choice(TONES))) for _ in range(2))
            ramp = Image.linear_gradient("L").rotate(self.random.choice((0, 90, 180)))
            return Image.composite(start, end, ramp.resize(size))
        papers = {
            "paper": (WHITE, WHITE, (245, 246, 248), (250, 246, 235), (225, 215, 190)),
            "night": ((18, 18, 20), (30, 34, 44), (20, 30, 60)),
            "colour": (self.vivid(), self.colour()),
        }
        return Image.new("RGB", size, self.random.choice(papers[kind]))

    def title(self, page: Image.Image, box: Box, letters: Letters) -> None:
        text = self.words(1, 6)
        size, squeeze = self.random.uniform(0.1, 0.3), self.random.choice((0.8, 1, 1))
        letters = replace(letters, largest=size, squeeze=squeeze)
        if letters.families not in (PLAIN, CONDENSED):  # outlined, these look like a meme's caption
            outline, glow = (self.random.choice((None, None, BLACK, WHITE, self.vivid())) for _ in range(2))
            fill = self.vivid() if self.chance(0.3) else letters.fill
            letters = replace(letters, fill=fill, outline=outline, glow=glow)
        self.write(page, text.upper() if self.chance(0.5) else text, box, letters)

    def line(self, page: Image.Image, box: Box, letters: Letters) -> None:
        self.write(page, self.words(1, 8), box, replace(letters, largest=0.05))

    def quote(self, page: Image.Image, box: Box, letters: Letters) -> None:
        text = self.words(5, 20)
        self.write(page, f"“{text}”" if self.chance(0.3) else text, box, replace(letters, largest=0.09))

    def greeting(self, page: Image.Image, box: Box, letters: Letters) -> None:
        self.write(page, self.random.choice(GREETINGS), box, replace(letters, largest=0.16))

    def credits(self, page: Image.Image, box: Box, letters: Letters) -> None:
        self.write(page, self.words(12, 30).upper(), box, Letters(CONDENSED, letters.fill, largest=0.025, squeeze=0.7))

    def text(self, page: Image.Image, box: Box, letters: Letters) -> None:
        text = " ".join(self.random.choice(self.texts) for _ in range(12))
        size = self.random.choice((0.018, 0.02, 0.025, 0.035))
        self.write(page, text, box, replace(letters, align="left", valign="top", largest=size))

    def points(self, page: Image.Image, box: Box, letters: Letters) -> None:
        left, top, right, bottom = box
        letters = replace(letters, align="left", valign="top", largest=0.05)
        for index in range(3):
            y = top + (bottom - top) * index / 3
            self.write(page, "• " + self.words(3, 11), (left, y, right, y + (bottom - top) / 3), letters)

    def table(self, page: Image.Image, box: Box, letters: Letters) -> None:
        left, top, right, bottom = box
        letters = replace(letters, align="left", largest=0.022)
        for row, column in itertools.product(range(5), range(4)):
            x, y = left + (right - left) * column / 4, top + (bottom - top) * row / 5
            self.write(page, self.words(1, 2), (x, y, x + (right - left) / 4.3, y + (bottom - top) / 5), letters)
            line = (left * page.width, y * page.height, right * page.width, y * page.height)
            ImageDraw.Draw(page).line(line, letters.fill)

    def figure(self, page: Image.Image, box: Box, _: Letters) -> None:
        left, top, right, bottom = in_pixels(page, box)
        page.paste(self.picture(right - left, bottom - top), (left, top))

    def emblem(self, page: Image.Image, box: Box, letters: Letters) -> None:
        left, top, right, bottom = in_pixels(page, box)
        r, x, y = min(right - left, bottom - top) / 2, (left + right) / 2, (top + bottom) / 2
        draw = ImageDraw.Draw(page)
        for scale in sorted((self.random.uniform(0.3, 1) for _ in range(self.random.randint(1, 3))), reverse=True):
            corners, turn = self.random.choice((3, 4, 5, 6, 60, 60)), self.random.randrange(90)
            line = letters.fill if self.chance(0.4) else None
            draw.regular_polygon((x, y, r * scale), corners, turn, self.vivid(), line)
        half = 0.4 * r
        inside = ((x - half) / page.width, (y - half) / page.height, (x + half) / page.width, (y + half) / page.height)
        self.write(page, self.words(1, 1)[:2].upper(), inside, Letters(letters.families, WHITE, largest=0.3))

    def diagram(self, page: Image.Image, box: Box, letters: Letters) -> None:
        left, top, right, bottom = box
        columns, draw = self.random.randint(1, 4), ImageDraw.Draw(page)
        width, last = (right - left) / columns, None
        tint = self.random.choice((None, self.vivid(), self.colour(180)))
        for column in range(columns):
            y = self.random.uniform(top, (top + bottom) / 2)
            cell = (left + column * width, y, left + (column + 0.7) * width, min(bottom, y + 0.14))
            x0, y0, x1, y1 = in_pixels(page, cell)
            if last:
                draw.line((*last, x0, (y0 + y1) // 2), letters.fill, 2)
            draw.rounded_rectangle((x0, y0, x1, y1), self.random.choice((0, 8)), tint, letters.fill, 2)
            self.write(page, self.words(1, 3), cell, replace(letters, largest=0.035, align="center"))
            last = (x1, (y0 + y1) // 2)

    def bar(self, page: Image.Image, box: Box, _: Letters) -> None:
        tint = self.random.choice((self.vivid(), (235, 235, 238), (50, 52, 60)))
        page.paste(tint, (0, 0, page.width, in_pixels(page, box)[3]))
        letters = Letters(PLAIN, BLACK if sum(tint) > 380 else WHITE, align="left", largest=0.04)
        self.write(page, self.words(1, 4), (0.04, 0.01, 0.9, box[3]), letters)

    def row(self, page: Image.Image, box: Box, letters: Letters) -> None:
        left, top, right, bottom = box
        x, y, _, end = in_pixels(page, box)
        side = 2 * (end - y) // 3
        ImageDraw.Draw(page).ellipse((x, y + 2, x + side, y + 2 + side), self.colour(60, 230))
        left, middle = left + 1.3 * side / page.width, (top + bottom) / 2
        name = replace(letters, align="left", largest=0.03)
        self.write(page, self.words(1, 4), (left, top, right, middle), name)
        below = replace(name, fill=(130, 130, 130), largest=0.024)
        self.write(page, self.words(2, 6), (left, middle, right, bottom), below)

    def field(self, page: Image.Image, box: Box, letters: Letters) -> None:
        ImageDraw.Draw(page).rounded_rectangle(in_pixels(page, box), 6, outline=(140, 140, 140))
        self.write(page, self.words(1, 3), box, replace(letters, largest=0.03))

    def button(self, page: Image.Image, box: Box, _: Letters) -> None:
        ImageDraw.Draw(page).rounded_rectangle(in_pixels(page, box), 6, self.vivid())
        self.write(page, self.random.choice(OFFERS), box, Letters(PLAIN, WHITE, largest=0.05))

    def tabs(self, page: Image.Image, box: Box, _: Letters) -> None:
        left, top, right, bottom = in_pixels(page, box)
        for index in range(4):
            x, tint = left + (right - left) * index // 4, self.vivid() if index == 0 else (150, 150, 150)
            ImageDraw.Draw(page).rounded_rectangle((x, top, x + (bottom - top), bottom), 4, tint)

    def badge(self, page: Image.Image) -> None:
        """An offer or a number in a disc."""
        r = int(min(page.size) * self.random.uniform(0.06, 0.16))
        x, y = self.random.randint(r, page.width - r), self.random.randint(r, page.height - r)
        ImageDraw.Draw(page).ellipse((x - r, y - r, x + r, y + r), self.vivid())
        text = self.random.choice((*OFFERS, *"12345"))
        box = ((x - r) / page.width, (y - r / 2) / page.height, (x + r) / page.width, (y + r / 2) / page.height)
        self.write(page, text, box, Letters(CONDENSED, WHITE, largest=0.1))


def in_pixels(page: Image.Image, box: Box) -> tuple[int, int, int, int]:
    """A box of shares as pixels of a page, at least one each way."""
    left, top = int(box[0] * page.width), int(box[1] * page.height)
    return left, top, max(left + 1, int(box[2] * page.width)), max(top + 1, int(box[3] * page.height))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text into lines no wider than `width` pixels, at spaces where there are any."""
    lines: list[str] = []
    for part in text.split("\n"):
        spaced = " " in part
        line = ""
        for piece in part.split() if spaced else part:
            longer = f"{line} {piece}" if line and spaced else line + piece
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = piece
            else:
                line = longer
        lines.append(line)
    return lines


def read_texts(files: list[Path]) -> list[str]:
    """Different sentences of fortune files, whose entries are parted by lines with a single %."""
    texts: dict[str, None] = {}
    for file in files:
        try:
            entries = file.read_text(encoding="utf-8").split("\n%")
        except UnicodeDecodeError:
            continue  # their indices are binary
        for entry in entries:
            text = " ".join(entry.replace("%", " ").partition("--")[0].split())
            letters = sum(c.isalpha() or c == " " for c in text)
            if 20 <= len(text) <= 400 and letters > 0.85 * len(text):
                texts[text] = None
    return list(texts)


def readable(path: Path) -> bool:
    """Whether a picture can be opened; those that cannot are named on stderr."""
    try:
        open_picture(path)
    except BadImage as error:
        print(f"{path}: {error}", file=sys.stderr)
        return False
    return True


def draw_one(
    index: int, *, label: str, pictures: list[Path], templates: list[Path], texts: list[str], out: Path
) -> tuple[Path, list[Box]]:
    """Draw and save the picture of one number; return its file, and where a text stands upon its whole page."""
    draw = random.Random(f"{SEED}-{label}-{index}")
    artist = Artist(draw, pictures, templates, texts)
    kinds = artist.memes if label == MEME else artist.others
    (name,) = draw.choices(list(kinds), [weight for weight, _ in kinds.values()])
    picture = kinds[name][1]()
    boxes = [box for page, box in artist.written if page is picture]
    picture.thumbnail((SAVED_SIDE, SAVED_SIDE), Image.Resampling.LANCZOS)
    group, _, kind = name.rpartition("__")
    folder = out / label / (f"{group}__drawn" if group else "drawn")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{index:06}.webp"
    picture.save(path, quality=QUALITY)
    return path, boxes


def write_captions(file: Path, drawn: list[tuple[Path, list[Box]]]) -> None:
    """Write a table of where the captions of the drawn memes are, a line for each."""
    with file.open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(("file", "left", "top", "right", "bottom"))
        for path, boxes in drawn:
            for box in boxes:
                rows.writerow((path.relative_to(file.parent).as_posix(), *(f"{side:.4f}" for side in box)))


def read_captions(folder: Path) -> dict[Path, list[Box]]:
    """Where the captions are of the memes that this program drew into a folder; of none, if it drew none."""
    captions: dict[Path, list[Box]] = defaultdict(list)
    if (folder / CAPTIONS_FILE).exists():
        with (folder / CAPTIONS_FILE).open(encoding="utf-8", newline="") as table:
            for row in csv.DictReader(table):
                sides = (float(row[side]) for side in ("left", "top", "right", "bottom"))
                captions[folder / row["file"]].append(cast("Box", tuple(sides)))
    return dict(captions)


def main() -> int:
    """Read the command line and draw; 0 when done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description="Draw labelled pictures to train on beside real ones.")
    parser.add_argument("pictures", type=Path, nargs="+", help="folders with photographs and art")
    parser.add_argument("--templates", type=Path, metavar="DIR", help="blank meme templates, to draw on as well")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="data folder, gets meme/ and not_meme/")
    parser.add_argument("--texts", type=Path, metavar="DIR", default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--memes", type=int, metavar="N", default=4000)
    parser.add_argument("--others", type=int, metavar="N", default=8000)
    arguments = parser.parse_args()

    pictures = [path for folder in arguments.pictures for path in find_pictures(folder) if readable(path)]
    templates = [path for path in find_pictures(arguments.templates) if readable(path)] if arguments.templates else []
    texts = read_texts(sorted(p for p in arguments.texts.rglob("*") if p.is_file())) if arguments.texts.is_dir() else []
    if not (pictures and texts and fonts(ANY)):
        parser.error(
            "there must be readable pictures to draw on, fortune files to take words from, and fonts to write with"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for label, count in ((MEME, arguments.memes), (NOT_MEME, arguments.others)):
            work = partial(
                draw_one, label=label, pictures=pictures, templates=templates, texts=texts, out=arguments.out
            )
            drawn = list(pool.map(work, range(count), chunksize=32))
            if label == MEME:
                write_captions(arguments.out / CAPTIONS_FILE, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
