"""What the internet does to a picture, for training."""

import math
import random
from io import BytesIO

from PIL import Image, ImageEnhance, ImageFilter


class Augment:
    """One random draw of crops, frames, recompression and the like. Captions at the edges survive."""

    def __init__(self, random_generator: random.Random) -> None:
        self.random = random_generator

    def __call__(self, picture: Image.Image) -> Image.Image:
        steps = (
            (0.8, self._crop),
            (0.1, self._frame),
            (0.2, self._mirror),
            (0.3, self._shrink),
            (0.5, self._colours),
            (0.1, self._grey),
            (0.1, self._blur),
            (0.2, self._sticker),
            (0.4, self._jpeg),
        )
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
        left, top, right, bottom = (int(self.random.uniform(0, 0.12) * max(picture.size)) for _ in range(4))
        colour = self.random.choice(("white", "black", tuple(self.random.randrange(256) for _ in range(3))))
        framed = Image.new("RGB", (left + width + right, top + height + bottom), colour)
        framed.paste(picture, (left, top))
        return framed

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
