import random

import numpy as np
from pictures import noise
from PIL import Image

from augment import Augment


def test_draws_differ_but_are_the_generators() -> None:
    picture = noise(120, 90)
    one, other = Augment(random.Random(1)), Augment(random.Random(1))
    drawn = [one(picture) for _ in range(50)]
    assert [p.tobytes() for p in drawn] == [other(picture).tobytes() for _ in range(50)]
    assert len({p.tobytes() for p in drawn}) > 45
    assert all(p.mode == "RGB" for p in drawn)


def test_the_original_stays_as_it_was() -> None:
    picture = noise(120, 90)
    before = picture.tobytes()
    augment = Augment(random.Random(0))
    for _ in range(100):
        augment(picture)
    assert picture.tobytes() == before


def test_a_crop_takes_at_most_a_tenth_from_each_side() -> None:
    """A caption at an edge must survive."""
    marked = np.zeros((100, 200, 3), np.uint8)
    marked[10:-10, 20:-20] = 255
    augment = Augment(random.Random(0))
    for _ in range(100):
        cropped = np.asarray(augment._crop(Image.fromarray(marked)))
        assert cropped.shape[0] < 100 or cropped.shape[1] < 200
        assert (cropped == 255).all(2).sum() == 80 * 160
