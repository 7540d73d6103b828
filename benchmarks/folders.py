"""Time classify.py on folders of pictures against the usual pipeline: python -m benchmarks.folders

The usual pipeline is what most people would write: Pillow opens a picture, torchvision's transforms make the input,
and DenseNet121 classifies it in full precision, one picture after another. All pipelines take turns in each round.
With --scale, classify.py alone classifies ever larger folders. The pictures are drawn by the benchmark.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from tqdm import trange

from classify import classify
from engine import (
    BATCH,
    FP32,
    INT8,
    OPENVINO,
    BadEngine,
    best_engine,
    describe_engine,
    load_fastest,
    native_precision,
    usable_cores,
)
from evaluation.dataset import plain_network
from images import open_picture, to_square
from model import DEFAULT_CHECKPOINT, Classifier, fastest_dtype
from tables import CsvTable, row_of

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.jpg"))
KINDS = {"memes, 600 pixels": (600, 256), "photos, 12 megapixels": (4000, 64)}  # width, and how many
USUAL = "usual pipeline"


def draw_folder(folder: Path, width: int, count: int) -> list[Path]:
    """Different JPEGs of one width in 4:3, as grainy as photographs."""
    folder.mkdir()
    for number in range(count):
        with Image.open(EXAMPLES[number % len(EXAMPLES)]) as example:
            picture = np.asarray(example.resize((width, width * 3 // 4)), np.float32)
        grain = np.random.default_rng(number).normal(0, 6, picture.shape)
        Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)
    return sorted(folder.iterdir())


def processor() -> str:
    """The processor's name, and whether the network runs in bfloat16 on it."""
    information = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(": ")[2] for line in information.splitlines() if line.startswith("model name")), "CPU")
    return f"{name} {'with' if fastest_dtype() == torch.bfloat16 else 'without'} bfloat16"


def usual_pipeline(classifier: Classifier) -> Callable[[list[Path]], object]:
    """The usual pipeline, from paths to probabilities of meme."""
    network = plain_network()
    transform = transforms.Compose(
        [
            transforms.Resize((classifier.preprocessing.input_size, classifier.preprocessing.input_size)),
            transforms.ToTensor(),
            transforms.Normalize(classifier.preprocessing.mean, classifier.preprocessing.std),
        ]
    )

    def answer(paths: list[Path]) -> list[float]:
        probabilities = []
        for path in paths:
            inputs = transform(Image.open(path).convert("RGB"))[None]
            with torch.no_grad():
                probabilities.append(float(network(inputs).softmax(1)[0, 0]))
        return probabilities

    return answer


def classifiers() -> list[Classifier]:
    """The checkpoint on PyTorch, and on OpenVINO in every precision that is possible here."""
    loaded = [Classifier.load()]
    if best_engine() == OPENVINO:
        loaded += [load_fastest(DEFAULT_CHECKPOINT, precision) for precision in sorted({FP32, native_precision()})]
        try:
            loaded.append(load_fastest(DEFAULT_CHECKPOINT, INT8))
        except BadEngine as error:
            print(error, file=sys.stderr)
    return loaded


def exhaust(classifier: Classifier, paths: list[Path]) -> None:
    """Classify all pictures and keep nothing."""
    deque(classify(classifier, paths), maxlen=0)


def compare(rounds: int) -> None:
    """Print pictures per second and ratios of all pipelines on all kinds of pictures."""
    loaded = classifiers()
    pipelines: dict[str, Callable[[list[Path]], object]] = {USUAL: usual_pipeline(loaded[0])}
    for classifier in loaded:
        name = f"classify.py, {describe_engine(classifier.network)}"
        pipelines[name] = partial(exhaust, classifier)
    print(f"{processor()}, {usable_cores()} cores, {rounds} rounds, torch {torch.__version__}")
    print("| pictures | pipeline | a second | times the usual one (quartiles over the rounds) |\n|---|---|---|---|")
    with TemporaryDirectory() as scratch:
        for kind, (width, count) in KINDS.items():
            paths = draw_folder(Path(scratch, str(width)), width, count)
            for pipeline in pipelines.values():
                pipeline(paths[:4])
            taken: dict[str, list[float]] = {name: [] for name in pipelines}
            for _ in trange(rounds, desc=kind, unit="round", leave=False):
                for name, pipeline in pipelines.items():
                    started = time.perf_counter()
                    pipeline(paths)
                    taken[name].append(time.perf_counter() - started)
            for name, seconds in taken.items():
                low, middle, high = np.quantile(np.array(taken[USUAL]) / seconds, (0.25, 0.5, 0.75))
                rate = count / np.median(seconds)
                print(f"| {kind} | {name} | {rate:.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) |")
            show_steps(kind, paths)


def show_steps(kind: str, paths: list[Path]) -> None:
    """Print what each step costs for one picture on one core, with PyTorch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    classifier = Classifier.load()
    seconds: dict[str, float] = {}

    def timed(step: str, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        started = time.perf_counter()
        results = [work(item) for item in items]
        seconds[step] = time.perf_counter() - started
        return results

    contents = timed("read", Path.read_bytes, paths)
    pictures = timed("decode", open_picture, contents)
    squares = timed("resize", lambda picture: to_square(picture, classifier.preprocessing.input_size), pictures)
    inputs = timed("normalise", classifier.preprocessing.normalise, batched(squares))
    classifier.answer(inputs[0])
    answers = timed("network", classifier.answer, inputs)
    with Path(os.devnull).open("w") as file:
        table = CsvTable(file)
        rows = [row_of(str(path), a, classifier.sha256) for path, a in zip(paths, chain(*answers), strict=True)]
        timed("write", table.write, rows)
    torch.set_num_threads(threads)
    for step, taken in seconds.items():
        share = taken / sum(seconds.values())
        print(f"| {kind} | {step}, on one core | {taken / len(paths) * 1000:.2f} ms each | {share:.0%} of the time |")


def batched(squares: list[Any]) -> list[list[Any]]:
    """The squares in batches of the size that classify.py uses on a CPU."""
    return [squares[start : start + BATCH] for start in range(0, len(squares), BATCH)]


def scale(counts: list[int]) -> None:
    """Print time and memory of classify.py on folders of these many pictures, which are links to ten."""
    print("| pictures | seconds | a second | memory, MB |\n|---|---|---|---|")
    with TemporaryDirectory() as scratch:
        originals = draw_folder(Path(scratch, "originals"), 600, 10)
        for count in counts:
            folder = Path(scratch, str(count))
            folder.mkdir()
            for number in range(count):
                os.link(originals[number % 10], folder / f"{number:07}.jpg")
            command = [
                sys.executable,
                str(ROOT / "classify.py"),
                str(folder),
                "--csv",
                str(Path(scratch, f"{count}.csv")),
            ]
            started = time.perf_counter()
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:  # noqa: S603
                _, status, used = os.wait4(running.pid, 0)
            seconds = time.perf_counter() - started
            if status:
                raise RuntimeError(f"classify.py failed on {count} pictures")
            print(f"| {count:,} | {seconds:.0f} | {count / seconds:.1f} | {used.ru_maxrss / 1000:,.0f} |", flush=True)


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.folders",
        description="Time classify.py on folders of pictures against the usual pipeline.",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=int, nargs="+", metavar="N", help="numbers of pictures in the folders")
    arguments = parser.parse_args()
    if arguments.scale:
        scale(arguments.scale)
    else:
        compare(arguments.rounds)


if __name__ == "__main__":
    main()
