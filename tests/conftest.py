"""What several tests share: folders of pictures, and a tiny network where weights don't matter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image
from torch import nn
from torchvision.models import DenseNet

from gradcam import METHODS
from model import CLASSES, Classifier, Preprocessing, as_stages, for_inference


@pytest.fixture(scope="session")
def tiny_network() -> nn.Module:
    """A frozen DenseNet of four layers with seeded weights."""
    torch.manual_seed(0)
    network = as_stages(
        DenseNet(growth_rate=8, block_config=(1, 1, 1, 1), num_init_features=16, bn_size=2, num_classes=2)
    )
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_classifier(tiny_network: nn.Module) -> Classifier:
    """The same in full precision: 64-pixel input, last feature map of 2 × 2."""
    return Classifier(
        network=for_inference(tiny_network, torch.float32),
        classes=CLASSES,
        preprocessing=Preprocessing(64),
        temperature=1.5,
        threshold=0.5,
        not_sure=(0.4, 0.6),
        evidence_scales=dict.fromkeys(METHODS, 0.7),
        sha256="",
        about={},
    )


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    """The checkpoint that the project ships."""
    return Classifier.load()


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Twenty different pictures of different shapes."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(40, 120, (20, 2))
    return [noise(int(width), int(height), seed) for seed, (width, height) in enumerate(sizes)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight memes and eight others from two sources each, one of them a group's, all tiny."""
    for label, source, hue in (
        ("meme", "one", 200),
        ("meme", "two", 220),
        ("not_meme", "poster__three", 40),
        ("not_meme", "four", 60),
    ):
        place = tmp_path / "data" / label / source
        place.mkdir(parents=True)
        for seed in range(4):
            blobs = np.asarray(noise(48, 48, seed)) // 4 + hue // 2
            Image.fromarray(blobs.astype(np.uint8)).save(place / f"{seed}.png")
    return tmp_path / "data"
