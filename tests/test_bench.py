from pictures import ROOT

import bench
from images import find_pictures
from model import Classifier


def test_every_contender_takes_its_turn() -> None:
    seconds = bench.measure(2)
    assert {bench.LABEL, bench.HEATMAP, "pytorch-grad-cam"} <= set(seconds)
    assert all(len(taken) == 2 and min(taken) > 0 for taken in seconds.values())


def test_our_answers_are_the_plain_networks(classifier: Classifier) -> None:
    examples = find_pictures(ROOT / "examples")
    words = bench.agreement(classifier, examples)
    assert words.startswith(f"{len(examples)} pictures: ")
    assert words.endswith(" 0 labels and 0 verdicts are others")
