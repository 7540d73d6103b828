"""Measure the classifier on labelled pictures: python -m evaluation.evaluate DATA_DIR --json FILE

DATA_DIR holds `meme/` and `not_meme/`; each of their sub-folders is one source. A negative's folder
may be named `GROUP__SOURCE` (`poster__some-museum`); any other name is a group of its own.
"""

import argparse
import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from classify import classify
from engine import AUTO, DEVICES, BadEngine, load_with_torch
from evaluation.dataset import LabelledPicture, read_folder, unseen_sources
from evaluation.metrics import (
    Array,
    accuracy_by_source,
    auroc,
    auroc_by_source,
    average_precision,
    bootstrap,
    calibration_error,
    calibration_noise_floor,
    f1,
    precision_recall_curve,
    reliability,
    roc_curve,
    share,
    source_bootstrap,
)
from images import BadImage
from model import DEFAULT_CHECKPOINT, MEME, NOT_MEME, NOT_SURE, BadCheckpoint, Classifier, Prediction

# The usual groups of negatives that carry text; what tells a meme detector from a text detector.
TEXT_GROUPS = {"card", "chart", "comic", "document", "poster", "scenetext", "screenshot", "watermark"}


def read_languages(index: Path) -> dict[tuple[str, ...], str]:
    """The languages in a table with columns `file` and `language`, by label, folder and file name."""
    with index.open(encoding="utf-8", newline="") as file:
        return {Path(row["file"]).parts[-3:]: row["language"] for row in csv.DictReader(file) if row["language"]}


def measure(
    pictures: list[LabelledPicture],
    predictions: list[Prediction],
    thresholds: dict[str, float],
    languages: dict[tuple[str, ...], str],
) -> dict[str, Any]:
    """Every figure of the classifier on these pictures, ready for JSON.

    Shares of pictures carry Wilson intervals, all else bootstrap percentiles over the pictures.
    Both take the pictures as independent; those of one source are not, so the truth for a new
    source can lie outside.

    Args:
        pictures: N labelled pictures.
        predictions: what the classifier said of each.
        thresholds: the classifier's, by strictness.
        languages: as `read_languages` gives them; memes of no known language are left out of that table.
    """
    text_negative = np.array([p.label == NOT_MEME and p.group in TEXT_GROUPS for p in pictures])
    truth = np.array([picture.label == MEME for picture in pictures])  # (N,)
    said = np.array([prediction.label == MEME for prediction in predictions])
    scores = np.array([prediction.meme_probability for prediction in predictions])
    answered = np.array([prediction.verdict != NOT_SURE for prediction in predictions])
    right = said == truth

    estimates = {
        "accuracy": share(right),
        "precision": share(truth[said]),
        "recall": share(said[truth]),
        "text_negatives": share(right[text_negative]),
        "f1": bootstrap(lambda i: f1(truth[i], said[i]), len(truth)),
        "auroc": bootstrap(lambda i: auroc(truth[i], scores[i]), len(truth)),
        "average_precision": bootstrap(lambda i: average_precision(truth[i], scores[i]), len(truth)),
        "ece": bootstrap(lambda i: calibration_error(truth[i], scores[i]), len(truth), biased=True),
        "brier": bootstrap(lambda i: float(np.mean((scores[i] - truth[i]) ** 2)), len(truth)),
        "accuracy_when_answered": share(right[answered]),
        "share_answered": share(answered),
    }
    return {
        "n": {MEME: int(truth.sum()), NOT_MEME: int((~truth).sum())},
        **{name: asdict(estimate) for name, estimate in estimates.items()},
        "ece_noise_floor": calibration_noise_floor(scores),
        "by_source": measure_by_source(pictures, scores, said),
        "strictness": {
            name: {
                "threshold": threshold,
                "recall": asdict(share(scores[truth] >= threshold)),
                "precision": asdict(share(truth[scores >= threshold])),
            }
            for name, threshold in thresholds.items()
        },
        "calibration": reliability_table(truth, scores),
        "groups": accuracy_by_name([p.group if p.label == NOT_MEME else None for p in pictures], right),
        "sources": accuracy_by_name([p.source if p.label == MEME else None for p in pictures], right),
        "languages": accuracy_by_name(
            [languages.get(p.path.parts[-3:]) if p.label == MEME else None for p in pictures], right
        ),
    }


def measure_by_source(pictures: list[LabelledPicture], scores: Array, said: Array) -> dict[str, Any]:
    """Accuracy and AUROC with all sources weighing alike; intervals from resampling whole sources of each class.

    Args:
        pictures: N labelled pictures.
        scores: probabilities of meme, shape (N,).
        said: whether each was called a meme, shape (N,).
    """
    truth = np.array([picture.label == MEME for picture in pictures])
    sources = np.array([picture.source for picture in pictures])
    memes, others = accuracy_by_source(truth, said == truth, sources)
    count = (len(memes), len(others))
    means = source_means(memes, others, auroc_by_source(truth, scores, sources))
    return {
        "sources": {MEME: count[0], NOT_MEME: count[1]},
        "accuracy": means["accuracy"],
        "recall": asdict(source_bootstrap(lambda i, _: float(memes[i].mean()), *count)),
        "specificity": asdict(source_bootstrap(lambda _, j: float(others[j].mean()), *count)),
        "auroc": means["auroc"],
    }


def source_means(memes: Array, others: Array, areas: Array) -> dict[str, Any]:
    """Mean accuracy and AUROC over sources, or mean differences of them, with their intervals.

    Args:
        memes: accuracy on each source of memes, shape (M,).
        others: accuracy on each source of other pictures, shape (N,).
        areas: AUROC of each pair of sources, shape (M, N).
    """
    count = (len(memes), len(others))
    return {
        "accuracy": asdict(source_bootstrap(lambda i, j: float(memes[i].mean() + others[j].mean()) / 2, *count)),
        "auroc": asdict(source_bootstrap(lambda i, j: float(areas[np.ix_(i, j)].mean()), *count)),
    }


def compare_by_source(
    pictures: list[LabelledPicture], predictions: list[Prediction], baseline: list[Prediction]
) -> dict[str, Any]:
    """By how much the predictions are better than the baseline's on the same pictures, with all sources weighing alike.

    Intervals are from resampling whole sources, the same ones for both.
    """
    truth = np.array([picture.label == MEME for picture in pictures])
    sources = np.array([picture.source for picture in pictures])
    both = []
    for given in (predictions, baseline):
        right = np.array([prediction.label == MEME for prediction in given]) == truth
        scores = np.array([prediction.meme_probability for prediction in given])
        both.append((*accuracy_by_source(truth, right, sources), auroc_by_source(truth, scores, sources)))
    return source_means(*(ours - theirs for ours, theirs in zip(*both, strict=True)))


def reliability_table(truth: Array, scores: Array) -> list[dict[str, Any]]:
    """Number, mean probability and share of memes of the pictures in each tenth of the probabilities that has some."""
    tenths = np.minimum((scores * 10).astype(int), 9)
    rows = []
    for tenth in np.unique(tenths).tolist():
        inside = tenths == tenth
        memes = asdict(share(truth[inside]))
        rows.append({"from": tenth / 10, "n": int(inside.sum()), "mean": float(scores[inside].mean())} | memes)
    return rows


def accuracy_by_name(names: list[str | None], right: Array) -> dict[str, Any]:
    """Number and accuracy of the pictures under each name."""
    table = {}
    for name in sorted({name for name in names if name is not None}):
        chosen = right[[other == name for other in names]]
        interval = share(chosen)
        table[name] = {"n": len(chosen), "accuracy": interval.value, "low": interval.low, "high": interval.high}
    return table


def plot_metrics(
    path: Path, pictures: list[LabelledPicture], predictions: list[Prediction], metrics: dict[str, Any]
) -> None:
    """Draw confusion matrix, ROC, precision-recall, reliability, scores and groups into one picture."""
    truth = np.array([picture.label == MEME for picture in pictures])
    scores = np.array([prediction.meme_probability for prediction in predictions])
    said = np.array([prediction.label == MEME for prediction in predictions])
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 3).flat)
    _draw_confusion(axes[0], truth, said)
    for ax, title, (x, y), name, labels in (
        (axes[1], "ROC", roc_curve(truth, scores), "auroc", ("false positive rate", "recall")),
        (
            axes[2],
            "Precision and recall",
            precision_recall_curve(truth, scores),
            "average_precision",
            ("recall", "precision"),
        ),
    ):
        ax.plot(x, y)
        value = metrics[name]["value"]
        ax.set(title=f"{title} (area {value:.4f})" if value is not None else title, xlabel=labels[0], ylabel=labels[1])
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    mean_scores, meme_shares, counts = reliability(truth, scores)
    axes[3].plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    axes[3].scatter(mean_scores, meme_shares, s=8 + 400 * counts / counts.max(), alpha=0.7)
    axes[3].set(
        title=f"Reliability (ECE {metrics['ece']['value']:.3f}, noise floor {metrics['ece_noise_floor']:.3f})",
        xlabel="probability of meme (mark's area: pictures)",
        ylabel="share of memes",
    )
    bins = np.linspace(0, 1, 31)
    axes[4].hist(
        [scores[truth], scores[~truth]], bins.tolist(), label=["memes", "not memes"], color=["tab:orange", "tab:blue"]
    )
    axes[4].set(title="Scores", xlabel="probability of meme", ylabel="pictures", yscale="log")
    axes[4].legend()
    _draw_groups(axes[5], metrics["groups"])
    figure.savefig(path, dpi=80)


def _draw_confusion(ax: Axes, truth: Array, said: Array) -> None:
    table = np.array([[int((truth == a) @ (said == b).astype(int)) for b in (True, False)] for a in (True, False)])
    ax.imshow(table / np.maximum(1, table.sum(1, keepdims=True)), cmap="Blues", vmin=0, vmax=1.6)
    for row, column in np.ndindex(2, 2):
        ax.text(column, row, f"{table[row, column]}", ha="center", va="center", fontsize=18)
    ax.set(title="Confusion", xlabel="answer", ylabel="truth")
    ax.set(xticks=[0, 1], yticks=[0, 1], xticklabels=["meme", "not a meme"], yticklabels=["meme", "not a meme"])


def _draw_groups(ax: Axes, groups: dict[str, Any]) -> None:
    rows = sorted(groups.items(), key=lambda item: item[1]["accuracy"])[:25]
    accuracy = np.array([row["accuracy"] for _, row in rows])
    spread = np.array([(row["accuracy"] - row["low"], row["high"] - row["accuracy"]) for _, row in rows]).T
    ax.barh(range(len(rows)), accuracy, xerr=spread.clip(0) if rows else None, color="tab:blue", alpha=0.8)
    ax.set(title="Not memes, by group", xlabel="called not a meme", xlim=(0, 1))
    ax.set(yticks=range(len(rows)), yticklabels=[f"{name} ({row['n']})" for name, row in rows])


def format_report(metrics: dict[str, Any]) -> str:
    """The metrics as a table for the terminal."""

    def line(name: str, row: dict[str, Any], key: str, note: str = "") -> str:
        if row[key] is None:
            return f"{name:42} not defined on these pictures"
        return f"{name:42} {row[key]:7.4f}   95 % interval {row['low']:.4f} to {row['high']:.4f}{note}"

    lines = [f"{metrics['n'][MEME]} memes, {metrics['n'][NOT_MEME]} not memes"]
    lines += [
        line(name, row, "value", f"   (noise floor {metrics['ece_noise_floor']:.4f})" if name == "ece" else "")
        for name, row in metrics.items()
        if isinstance(row, dict) and "value" in row
    ]
    for title, key in (("Mean over sources", "by_source"), ("Better than the baseline by", "better_than_baseline")):
        if key in metrics:
            lines.append(f"\n{title}")
            lines += [line(f"  {name}", row, "value") for name, row in metrics[key].items() if name != "sources"]
    lines.append("\nStrictness")
    for name, row in metrics["strictness"].items():
        for figure in ("recall", "precision"):
            lines.append(line(f"  {name} (from {row['threshold']:.3f} on): {figure}", row[figure], "value"))
    tables = (("Groups of negatives", "groups"), ("Sources of memes", "sources"), ("Languages of memes", "languages"))
    for title, key in tables:
        if metrics[key]:
            lines.append(f"\n{title}")
            lines += [line(f"  {name} ({row['n']})", row, "accuracy") for name, row in metrics[key].items()]
    return "\n".join(lines)


def predict_all(
    classifier: Classifier, pictures: list[LabelledPicture]
) -> tuple[list[LabelledPicture], list[Prediction]]:
    """Classify labelled pictures; those that cannot be opened are named on stderr and left out."""
    read: list[LabelledPicture] = []
    predictions: list[Prediction] = []
    answers = classify(classifier, [picture.path for picture in pictures])
    for picture, (path, answer) in zip(tqdm(pictures, desc="Measuring", unit="picture"), answers, strict=True):
        if isinstance(answer, BadImage):
            tqdm.write(f"{path}: {answer}", file=sys.stderr)
        else:
            read.append(picture)
            predictions.append(answer)
    return read, predictions


def main() -> int:
    """Read the command line, measure, print, write; 0 when all is done, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.evaluate", description="Measure the classifier on labelled pictures."
    )
    parser.add_argument("data", type=Path, help="folder with meme/ and not_meme/")
    parser.add_argument("--train", type=Path, metavar="DIR", help="leave out pictures of sources that are in DIR, too")
    parser.add_argument("--languages", type=Path, metavar="CSV", help="table with the columns file and language")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw them")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="checkpoint to compare with, source by source")
    parser.add_argument("--device", choices=DEVICES, default=AUTO, help="auto: an accelerator if there is one")
    arguments = parser.parse_args()

    pictures = read_folder(arguments.data)
    if arguments.train:
        pictures = unseen_sources(pictures, read_folder(arguments.train))
    if not pictures:
        parser.error(f"there are no pictures below {arguments.data}/meme or {arguments.data}/not_meme")
    try:
        classifier = load_with_torch(arguments.checkpoint, device=arguments.device)
        baseline = load_with_torch(arguments.baseline, device=arguments.device) if arguments.baseline else None
        languages = read_languages(arguments.languages) if arguments.languages else {}
    except (BadCheckpoint, BadEngine) as error:
        parser.error(str(error))
    except (OSError, KeyError, TypeError, ValueError) as error:
        parser.error(f"{arguments.languages} is not a readable table with the columns file and language: {error}")

    read, predictions = predict_all(classifier, pictures)
    if not read:
        parser.error(f"none of the {len(pictures)} pictures could be opened")
    metrics = {"checkpoint_sha256": classifier.sha256, "unreadable": len(pictures) - len(read)}
    metrics |= measure(read, predictions, classifier.thresholds, languages)
    if baseline:
        metrics["baseline_sha256"] = baseline.sha256
        metrics["better_than_baseline"] = compare_by_source(read, predictions, predict_all(baseline, read)[1])
    print(format_report(metrics))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_metrics(arguments.plot, read, predictions, metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
