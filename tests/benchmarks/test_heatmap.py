from pictures import ROOT

from benchmarks import heatmap
from images import find_pictures
from model import Classifier


def test_every_contender_takes_its_turn() -> None:
    seconds = heatmap.measure(2)
    assert {heatmap.LABEL, heatmap.HEATMAP, "pytorch-grad-cam"} <= set(seconds)
    assert all(len(taken) == 2 and min(taken) > 0 for taken in seconds.values())


def test_our_answers_are_the_plain_networks(classifier: Classifier) -> None:
    examples = find_pictures(ROOT / "examples")
    words = heatmap.agreement(classifier, examples)
    assert words.startswith(f"{len(examples)} pictures: ")
    assert words.endswith(" 0 labels and 0 verdicts are others")
