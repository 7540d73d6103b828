"""Time label and heatmap against the usual libraries: python -m benchmarks.heatmap

All contenders take turns, so other work on the machine slows all of them: read the ratios. With --agree DATA_DIR,
compare the answers with those of torchvision's network in full precision instead. Needs requirements-dev.txt.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from tqdm import tqdm, trange

from benchmarks.folders import processor
from classify import classify
from engine import AUTO, PRECISIONS, describe_engine, load_fastest
from evaluation.dataset import plain_network
from evaluation.report import time_table
from gradcam import explain
from images import find_pictures, open_picture
from model import DEFAULT_CHECKPOINT, MEME, Classifier, Prediction

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "examples" / "cat_meme.jpg"
LABEL, HEATMAP = "our label", "our label and heatmap"


def contenders(classifier: Classifier) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each starts from the same opened picture."""
    picture = open_picture(PICTURE)
    plain, tapped, attributed = plain_network(), plain_network(), plain_network()  # hooks of one would slow the others
    index = classifier.classes.index(MEME)
    library = GradCAM(tapped, [tapped.get_submodule("features.norm5")])
    other = LayerGradCam(attributed, attributed.get_submodule("features.norm5"))

    def label_in_full_precision() -> object:
        with torch.inference_mode():
            return plain(classifier.preprocess([picture]))

    return {
        "pytorch-grad-cam": lambda: library(classifier.preprocess([picture]), [ClassifierOutputTarget(index)]),
        "captum's LayerGradCam": lambda: other.attribute(classifier.preprocess([picture]), index),
        "torchvision's DenseNet121, label only": label_in_full_precision,
        HEATMAP: lambda: explain(classifier, [picture]),
        LABEL: lambda: classifier.predict([picture]),
    }


def agreement(classifier: Classifier, paths: list[Path]) -> str:
    """Compare our answers with those of the plain network, in one sentence."""
    plain = dataclasses.replace(classifier, network=plain_network(), exact=None)
    pairs = [
        (ours, theirs)
        for (_, ours), (_, theirs) in tqdm(
            zip(classify(classifier, paths), classify(plain, paths), strict=True), total=len(paths), unit="picture"
        )
        if isinstance(ours, Prediction) and isinstance(theirs, Prediction)
    ]
    apart = np.array([abs(ours.meme_probability - theirs.meme_probability) for ours, theirs in pairs])
    return (
        f"{len(pairs)} pictures: probabilities differ by {apart.max():.4f} at most, {np.median(apart):.5f} in the "
        f"median; {sum(ours.label != theirs.label for ours, theirs in pairs)} labels and "
        f"{sum(ours.verdict != theirs.verdict for ours, theirs in pairs)} verdicts differ"
    )


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; all take their turn in every round."""
    timed = contenders(Classifier.load())
    for run in timed.values():
        for _ in range(3):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in trange(rounds, unit="round"):
        for name, run in timed.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.heatmap", description="Time label and heatmap against the usual libraries."
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="the page uses one for each session")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the times")
    parser.add_argument("--agree", type=Path, metavar="DIR", help="pictures to compare answers on")
    parser.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="of classify.py with --agree")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.agree:
        paths = find_pictures(arguments.agree)
        print(f"Page: {agreement(Classifier.load(), paths)}")
        fast = load_fastest(DEFAULT_CHECKPOINT, arguments.precision)
        print(f"classify.py on {describe_engine(fast.network)}: {agreement(fast, paths)}")
        return

    seconds = measure(arguments.rounds)
    ours = np.array(seconds[HEATMAP])
    rows = {}
    for name, taken in seconds.items():
        low, middle, high = np.quantile(np.array(taken) / ours, (0.25, 0.5, 0.75))
        rows[name] = {"median_ms": np.median(taken) * 1000, "ratio": middle, "low": low, "high": high}
    print(f"{arguments.rounds} rounds, {arguments.threads} threads, torch {torch.__version__}")
    print(time_table(rows))
    if arguments.json:
        about = {"rounds": arguments.rounds, "threads": arguments.threads, "processor": processor()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(about | {"times": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
