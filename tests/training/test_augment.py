import random

import numpy as np
import torch
from pictures import noise
from PIL import Image

from training.augment import Augment, mix


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


def test_a_telephone_shows_the_whole_picture_between_its_bars() -> None:
    augment = Augment(random.Random(0))
    for size in ((200, 100), (100, 300)):
        picture = noise(*size)
        screen = augment._telephone(picture)
        assert screen.width == picture.width
        assert screen.height >= max(1.4 * picture.width - 1, picture.height + 1)
        found = [
            top
            for top in range(screen.height - picture.height + 1)
            if screen.crop((0, top, picture.width, top + picture.height)).tobytes() == picture.tobytes()
        ]
        assert len(found) == 1
        assert 0 < found[0] < screen.height - picture.height


def test_a_random_part_is_of_any_size_and_shape() -> None:
    augment = Augment(random.Random(0))
    parts = [augment.random_part(noise(200, 100)) for _ in range(200)]
    areas = [part.width * part.height / 20_000 for part in parts]
    assert 0.1 < min(areas) < 0.2
    assert 0.8 < max(areas) <= 1
    ratios = [part.width / part.height for part in parts]
    assert min(ratios) < 1.3
    assert max(ratios) > 3


def test_what_is_mixed_is_mixed_alike_at_every_size() -> None:
    """Reference: pictures of one value each, so that shares and areas can be read from the pixels."""
    values = torch.arange(100.0)[:, None, None, None]
    inputs = {size: values.expand(100, 3, size, size) for size in (32, 64)}
    which = list(range(0, 100, 2))
    mixed = mix(inputs, which, random.Random(0))
    for size in inputs:
        assert torch.equal(mixed[size][1::2], inputs[size][1::2])
    unchanged = sum(torch.equal(mixed[32][index], inputs[32][index]) for index in which)
    assert 10 < unchanged < 30  # of 50
    blended = [index for index in which if mixed[32][index].unique().numel() == 1]
    pasted = [index for index in which if mixed[32][index].unique().numel() == 2]
    assert len(blended) + len(pasted) == len(which)
    assert len(pasted) > 5
    for index in which:
        assert abs(mixed[32][index].mean() - mixed[64][index].mean()) < 0.05 * 100
        assert index in mixed[32][index].unique() or index in blended
