"""What the internet does to a picture, for training."""

import math
import random
from collections.abc import Callable, Iterable
from io import BytesIO

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

Step = Callable[[Image.Image], Image.Image]


class Augment:
    """One random draw of crops, frames, recompression and the like. Captions at the edges survive."""

    def __init__(self, random_generator: random.Random) -> None:
        self.random = random_generator
        self.moving: tuple[tuple[float, Step], ...] = (
            (0.8, self._crop),
            (0.15, self._frame),
            (0.06, self._telephone),
            (0.2, self._mirror),
        )
        self.still: tuple[tuple[float, Step], ...] = (
            (0.3, self._shrink),
            (0.5, self._colours),
            (0.1, self._grey),
            (0.1, self._blur),
        )
        self.covering = (0.2, self._sticker)
        self.last = (0.4, self._jpeg)

    def __call__(self, picture: Image.Image) -> Image.Image:
        return self._some((*self.moving, *self.still, self.covering, self.last), picture)

    def random_part(self, picture: Image.Image) -> Image.Image:
        """Any part of a picture, in any shape and colours, to which its label no longer belongs."""
        width, height = picture.size
        area, ratio = self.random.uniform(0.12, 1) * width * height, math.exp(self.random.uniform(-0.7, 0.7))
        part_w = min(width, max(1, int(math.sqrt(area * ratio * width / height))))
        part_h = min(height, max(1, int(math.sqrt(area / ratio * height / width))))
        left, top = self.random.randint(0, width - part_w), self.random.randint(0, height - part_h)
        picture = picture.crop((left, top, left + part_w, top + part_h))
        steps = ((0.5, self._colours), (0.4, self._mirror), (0.1, ImageOps.invert), (0.2, self._jpeg))
        return self._some(steps, picture)

    def _some(self, steps: Iterable[tuple[float, Step]], picture: Image.Image) -> Image.Image:
        for probability, step in steps:
            if self.random.random() < probability:
                picture = step(picture)
        return picture

    def _crop(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        left, top, right, bottom = (self.random.uniform(0, 0.1) for _ in range(4))
        return picture.crop(
            (int(left * width), int(top * height), math.ceil((1 - right) * width), math.ceil((1 - bottom) * height))
        )

    def _frame(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        widest = self.random.choice((0.12, 0.12, 0.35))
        left, top, right, bottom = (int(self.random.uniform(0, widest) * max(picture.size)) for _ in range(4))
        colour = self.random.choice(("white", "black", tuple(self.random.randrange(256) for _ in range(3))))
        framed = Image.new("RGB", (left + width + right, top + height + bottom), colour)
        framed.paste(picture, (left, top))
        return framed

    def _telephone(self, picture: Image.Image) -> Image.Image:
        """Show it in an app on a telephone: signs above, buttons below, perhaps lines of text."""
        width, bar = picture.width, max(4, picture.width // 12)
        height = max(int(self.random.uniform(1.4, 2.3) * width), picture.height + 4 * bar)
        ground, ink = self.random.choice((("black", "#c0c0c0"), ("#1b1b1f", "#8a8a90"), ("white", "#404040")))
        screen = Image.new("RGB", (width, height), ground)
        top = self.random.choice(
            ((height - picture.height) // 2, self.random.randint(bar, height - picture.height - bar))
        )
        draw = ImageDraw.Draw(screen)
        for x in (0.02, 0.8, 0.9):
            draw.rectangle((x * width, bar // 4, (x + 0.08) * width, bar // 2), ink)
        for x in (0.2, 0.5, 0.8):
            draw.ellipse((x * width, height - bar, x * width + bar // 2, height - bar // 2), ink)
        for y in range(top + picture.height + bar, height - 2 * bar, bar) if self.random.random() < 0.5 else ():
            draw.rectangle((0.05 * width, y, self.random.uniform(0.3, 0.95) * width, y + bar // 4), ink)
        screen.paste(picture, (0, top))
        return screen

    def _mirror(self, picture: Image.Image) -> Image.Image:
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def _shrink(self, picture: Image.Image) -> Image.Image:
        factor = self.random.uniform(0.35, 0.9)
        small = picture.resize([max(16, int(side * factor)) for side in picture.size], Image.Resampling.BILINEAR)
        return small.resize(picture.size, self.random.choice((Image.Resampling.BILINEAR, Image.Resampling.NEAREST)))

    def _colours(self, picture: Image.Image) -> Image.Image:
        for enhance, spread in (
            (ImageEnhance.Brightness, 0.35),
            (ImageEnhance.Contrast, 0.35),
            (ImageEnhance.Color, 0.8),
        ):
            picture = enhance(picture).enhance(self.random.uniform(1 - spread, 1 + spread))
        return picture

    def _grey(self, picture: Image.Image) -> Image.Image:
        return picture.convert("L").convert("RGB")

    def _blur(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(self.random.uniform(0.3, 1.5)))

    def _sticker(self, picture: Image.Image) -> Image.Image:
        width, height = (max(1, int(self.random.uniform(0.08, 0.35) * side)) for side in picture.size)
        colour = tuple(self.random.randrange(256) for _ in range(3))
        covered = picture.copy()
        at = (self.random.randrange(picture.width - width + 1), self.random.randrange(picture.height - height + 1))
        covered.paste(colour, (*at, at[0] + width, at[1] + height))
        return covered

    def _jpeg(self, picture: Image.Image) -> Image.Image:
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=self.random.randint(10, 95))
        return Image.open(buffer, formats=("JPEG",)).convert("RGB")


def mix(inputs: dict[int, Tensor], which: list[int], draw: random.Random) -> dict[int, Tensor]:
    """Lay others over some pictures of a batch, or put a part of another into them; a third stays as it is.

    Zhang et al. 2018, "mixup", arXiv 1710.09412; Yun et al. 2019, "CutMix", arXiv 1905.04899.

    Args:
        inputs: the same pictures at several sizes, of shape (N, 3, S, S) by S; all are mixed alike.
        which: the indices of those that may be mixed with any of the batch.
        draw: whence every choice comes.
    """
    mixed = {size: batch.clone() for size, batch in inputs.items()}
    for index in which:
        kind, other = draw.random(), draw.randrange(len(next(iter(inputs.values()))))
        share = draw.uniform(0.5, 1)
        width, height = draw.uniform(0.2, 0.8), draw.uniform(0.2, 0.8)
        left, top = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
        for size, batch in inputs.items():
            if kind < 0.35:
                mixed[size][index] = share * batch[index] + (1 - share) * batch[other]
            elif kind < 0.65:
                rows = slice(int(top * size), int((top + height) * size))
                columns = slice(int(left * size), int((left + width) * size))
                mixed[size][index, :, rows, columns] = batch[other, :, rows, columns]
    return mixed
