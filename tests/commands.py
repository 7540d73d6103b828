"""Run a command in the process of the test, and read its table."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

import classify
from model import Classifier


def run(
    monkeypatch: pytest.MonkeyPatch, main: Callable[[], int], classifier: Classifier | None, *arguments: str | Path
) -> int:
    """Call a command's `main` with these arguments.

    Args:
        monkeypatch: of the test.
        main: of the command.
        classifier: what any checkpoint loads as, or None to read checkpoints as usual.
        arguments: of the command line.

    Returns:
        The exit code.
    """
    if classifier:
        monkeypatch.setattr(Classifier, "load", lambda *_: classifier)
        monkeypatch.setattr(classify, "load_fastest", lambda *_: classifier)
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return main()


class Command(Protocol):
    """A command that takes its arguments and returns its exit code."""

    def __call__(self, *arguments: str | Path) -> int:
        """Run it."""


def rows_of(table: Path) -> list[dict[str, str]]:
    """The rows of a CSV table that classify.py wrote."""
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return list(csv.DictReader(file))
