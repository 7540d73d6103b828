import pytest
from pictures import ROOT
from tiny import build_tiny_network

from benchmarks import heatmap
from images import find_pictures
from model import Classifier


def test_every_contender_takes_its_turn(tiny_classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "plain_network", lambda: build_tiny_network().requires_grad_())
    monkeypatch.setattr(Classifier, "load", lambda: tiny_classifier)
    seconds = heatmap.measure(2)
    assert {heatmap.LABEL, heatmap.HEATMAP, "pytorch-grad-cam"} <= set(seconds)
    assert all(len(taken) == 2 and min(taken) > 0 for taken in seconds.values())


def test_our_answers_are_the_plain_networks(classifier: Classifier) -> None:
    examples = find_pictures(ROOT / "examples")
    words = heatmap.agreement(classifier, examples)
    assert words.startswith(f"{len(examples)} pictures: ")
    assert words.endswith(" 0 labels and 0 verdicts differ")
