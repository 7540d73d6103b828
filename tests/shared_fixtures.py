"""Fixtures that several test files share: classifiers, a server, a browser and folders of pictures."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import Command, run
from pictures import noise
from PIL import Image
from playwright.sync_api import Browser
from tiny import build_tiny_classifier, build_tiny_network
from torch import nn

import classify
import model
from benchmarks.page import chromium, running_server
from model import Classifier, save_checkpoint


@pytest.fixture(scope="session")
def tiny_network() -> nn.Module:
    """A frozen DenseNet of four layers with seeded weights."""
    return build_tiny_network()


@pytest.fixture(scope="session")
def tiny_classifier(tiny_network: nn.Module) -> Classifier:
    """The same in full precision: 64-pixel input, last feature map of 2 × 2."""
    return build_tiny_classifier(tiny_network)


@pytest.fixture
def classify_tiny(tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> Command:
    """classify.py in this process, with the tiny network in place of any checkpoint."""
    return partial(run, monkeypatch, classify.main, tiny_classifier)


@pytest.fixture
def tiny_checkpoint(tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the tiny network, in place of DenseNet121."""
    monkeypatch.setattr(model, "build_network", build_tiny_network)
    path = tmp_path / "tiny.pth"
    save_checkpoint(
        path,
        build_tiny_network(),
        tiny_classifier.preprocessing,
        temperature=tiny_classifier.temperature,
        threshold=tiny_classifier.threshold,
        not_sure=tiny_classifier.not_sure,
        thresholds=tiny_classifier.thresholds,
        evidence_scales=tiny_classifier.evidence_scales,
        about={},
    )
    return path


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    """The checkpoint that the project ships."""
    return Classifier.load()


@pytest.fixture(scope="session")
def server_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server of `address` would write temporary files."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def address(server_tmp: Path) -> Iterator[str]:
    """The address of a server of the page and the HTTP interface, for tests that need no settings of their own."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TMPDIR", str(server_tmp))  # of the server only: Ray's sockets need a short one
            address, _ = stack.enter_context(running_server("serve.py"))
        yield address


@pytest.fixture(scope="module")  # while Playwright runs, no other test of the process may call asyncio.run
def browser() -> Iterator[Browser]:
    """A Chromium. Without one, CI fails and a laptop skips."""
    try:
        with chromium() as browser:
            yield browser
    except FileNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


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
