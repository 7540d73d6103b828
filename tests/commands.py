"""Commands run as from the command line, but inside the test."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import classify
from model import Classifier


def run(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], classifier: Classifier | None, *arguments: str | Path
) -> int:
    """Call `main` with these arguments; a classifier given here is what any checkpoint loads as."""
    if classifier:
        monkeypatch.setattr(Classifier, "load", lambda *_: classifier)
        monkeypatch.setattr(classify, "load_fastest", lambda *_: classifier)
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return main()
