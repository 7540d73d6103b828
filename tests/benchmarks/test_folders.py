import dataclasses

import pytest

from benchmarks import folders
from engine import INT8, BadEngine, describe_engine
from model import Classifier


@pytest.fixture
def tiny_pipelines(tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """The tiny network in place of the checkpoint."""
    monkeypatch.setattr(folders, "classifiers", lambda: [tiny_classifier])
    monkeypatch.setattr(Classifier, "load", lambda: tiny_classifier)
    monkeypatch.setattr(folders, "plain_network", lambda: tiny_classifier.network)
    return tiny_classifier


def test_all_pipelines_take_turns(
    tiny_pipelines: Classifier, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folders, "KINDS", {"few": (64, 5)})
    folders.compare(2)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [cells[1] for cells in lines if cells[0] == "| few"] == [
        folders.USUAL,
        f"classify.py, {describe_engine(tiny_pipelines.network)}",
        *(f"{step}, on one core" for step in ("read", "decode", "resize", "normalise", "network", "write")),
    ]
    (usual,) = [cells for cells in lines if cells[1:2] == [folders.USUAL]]
    assert usual[3] == "1.00 (1.00–1.00) |"


def test_every_precision_of_this_processor_is_compared(
    tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(_checkpoint: object, precision: str) -> Classifier:
        asked.append(precision)
        if precision == INT8:
            raise BadEngine("There is no best_model.int8.xml.")
        return dataclasses.replace(tiny_classifier, sha256=precision)

    monkeypatch.setattr(folders, "load_fastest", load)
    monkeypatch.setattr(Classifier, "load", lambda: tiny_classifier)
    for native, expected in (("bf16", ["bf16", "fp32"]), ("fp32", ["fp32"])):
        asked.clear()
        monkeypatch.setattr(folders, "native_precision", lambda native=native: native)
        assert [classifier.sha256 for classifier in folders.classifiers()] == ["", *expected]
        assert asked == [*expected, INT8]
    monkeypatch.setattr(folders, "best_engine", lambda: "PyTorch")
    assert folders.classifiers() == [tiny_classifier]


def test_a_larger_folder_gets_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    folders.scale([3])
    *_, row = capsys.readouterr().out.splitlines()
    _, pictures, seconds, rate, memory, _ = row.split("|")
    assert int(pictures) == 3
    assert float(rate) == pytest.approx(3 / float(seconds), abs=0.15)
    assert float(memory.replace(",", "")) > 200
