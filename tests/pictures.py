"""Pictures that the tests draw themselves."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured blobs, different for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Encode a picture as the bytes of a file."""
    buffer = BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()
