"""Write the measured figures of outputs/*.json into the documents: python -m evaluation.report

Each table or sentence stands between two comments with its name, <!-- name --> and <!-- /name -->.
"""

import json
import re
from pathlib import Path
from typing import Any

from evaluation import faithfulness, robustness
from evaluation.metrics import Estimate
from model import DEFAULT_CHECKPOINT, Classifier

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "MODEL_CARD.md", "docs/heatmaps.md", "docs/speed.md", "docs/training.md")
FIGURES = {
    "accuracy": "accuracy",
    "precision": "precision: of the pictures called memes, how many are",
    "recall": "recall: of the memes, how many are found",
    "f1": "F1",
    "text_negatives": "negatives with text (all kinds but photo and graphic) called not a meme",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "accuracy_when_answered": "accuracy of the answers other than *not sure*",
    "share_answered": "share of the answers other than *not sure*",
    "ece": "calibration error, ECE (noise floor {ece_noise_floor:.3f})",
    "brier": "Brier score",
}
IN_BRIEF = ("accuracy", "precision", "recall", "text_negatives", "share_answered")
NOT_IN_PERCENT = ("auroc", "average_precision", "ece", "brier")
SOURCE_FIGURES = {
    "accuracy": "accuracy, both classes weighing alike",
    "recall": "memes found",
    "specificity": "others called not a meme",
    "auroc": "AUROC of a source of memes against a source of others",
}
STRICTNESS = {
    "nearly_all": "find nearly all memes",
    "balanced": "balanced (the label)",
    "certain": "only the certain ones",
}
LANGUAGES = {"en": "English", "es": "Spanish", "ru": "Russian", "pl": "Polish", "pt": "Portuguese"}
KINDS = {"scenetext": "photos with text in the scene"}  # of the others, the plural
MIN_WEAK = 50  # pictures; a smaller group says little
WEAKEST = 3  # groups and sources named as weaknesses

Row = dict[str, Any]


def percent(value: float) -> str:
    """A share, such as "92.3 %"."""
    return f"{100 * value:.1f} %"


def with_interval(row: Row, key: str = "value") -> str:
    """A share with its 95 % interval, or a dash if no picture defines it."""
    return "–" if row[key] is None else f"{percent(row[key])} ({percent(row['low'])} to {percent(row['high'])})"


def decimal_with_interval(row: Row) -> str:
    """A figure that is no share, with its 95 % interval."""
    return "–" if row["value"] is None else f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def figure_table(metrics: Row, keys: tuple[str, ...]) -> str:
    """Single figures of the test set."""
    lines = ["| figure | value (95 % interval) |", "|---|---|"]
    for key in keys:
        write = decimal_with_interval if key in NOT_IN_PERCENT else with_interval
        lines.append(f"| {FIGURES[key].format(**metrics)} | {write(metrics[key])} |")
    return "\n".join(lines)


def source_table(means: Row) -> str:
    """Means over sources, each weighing alike."""
    title = f"mean over {means['sources']['meme']} sources of memes and {means['sources']['not_meme']} of others"
    lines = [f"| {title} | value (95 % interval) |", "|---|---|"]
    for key, name in SOURCE_FIGURES.items():
        write = decimal_with_interval if key in NOT_IN_PERCENT else with_interval
        lines.append(f"| {name} | {write(means[key])} |")
    return "\n".join(lines)


def history_table(histories: dict[str, list[Row]]) -> str:
    """Where each network of the training stood at its end: means over the validation sources."""
    lines = ["| network | draws | accuracy at even odds | AUROC |", "|---|---|---|---|"]
    for name, history in histories.items():
        end = history[-1]
        figures = (percent(end["validation_accuracy"]), f"{end['validation_auroc']:.3f}")
        lines.append(f"| {name} | {end['pictures']:,} | {' | '.join(figures)} |")
    return "\n".join(lines)


def improvement_table(better: Row) -> str:
    """By how much a checkpoint is better than the one before it: differences of means over sources."""
    lines = ["| better than the first edition by | value (95 % interval) |", "|---|---|"]
    accuracy = {key: 100 * value for key, value in better["accuracy"].items()}
    interval = f"{accuracy['low']:.1f} to {accuracy['high']:.1f}"
    lines.append(f"| accuracy, percentage points | {accuracy['value']:.1f} ({interval}) |")
    lines.append(f"| AUROC | {decimal_with_interval(better['auroc'])} |")
    return "\n".join(lines)


def strictness_table(rows: dict[str, Row]) -> str:
    """Recall and precision at each strictness setting of the page."""
    lines = ["| strictness | meme from | recall | precision |", "|---|---|---|---|"]
    for key, row in rows.items():
        cells = (percent(row["threshold"]), with_interval(row["recall"]), with_interval(row["precision"]))
        lines.append(f"| {STRICTNESS[key]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def share_table(title: str, rows: dict[str, Row]) -> str:
    """Shares of correct answers by group, source or language, the highest first."""
    lines = [f"| {title} | pictures | right |", "|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
        lines.append(f"| {name} | {row['n']} | {with_interval(row, 'accuracy')} |")
    return "\n".join(lines)


def weakest(rows: dict[str, Row]) -> list[tuple[str, Row]]:
    """The groups or sources of at least `MIN_WEAK` pictures that are least often right, the worst first."""
    large = [(name, row) for name, row in rows.items() if row["n"] >= MIN_WEAK]
    return sorted(large, key=lambda item: item[1]["accuracy"])[:WEAKEST]


def weakness_sentence(kinds: dict[str, Row]) -> str:
    """The kinds of pictures that are most often called memes."""
    named = [f"{name} ({percent(1 - row['accuracy'])})" for name, row in weakest(kinds)]
    return f"Most often called memes by mistake: {', '.join(named)}."


def failure_table(metrics: Row, kinds: dict[str, Row], sources: dict[str, Row]) -> str:
    """How many pictures of the weakest kinds and sources are classified wrongly, and of all others."""
    lines = ["| failure on the test set | pictures |", "|---|---|"]
    for rows, total, what in (
        (kinds, metrics["n"]["not_meme"], "called a meme"),
        (sources, metrics["n"]["meme"], "meme missed"),
    ):
        named = weakest(rows)
        wrong = {name: round(row["n"] * (1 - row["accuracy"])) for name, row in rows.items()}
        lines += [f"| {name}: {what} | {wrong[name]} of {row['n']} |" for name, row in named]
        others = sum(wrong.values()) - sum(wrong[name] for name, _ in named)
        lines.append(f"| all others: {what} | {others} of {total - sum(row['n'] for _, row in named)} |")
    return "\n".join(lines)


def calibration_table(rows: list[Row]) -> str:
    """The share of memes among the pictures with a probability in each tenth."""
    lines = ["| probability of meme | pictures | mean probability | memes among them |", "|---|---|---|---|"]
    for row in rows:
        tenth = f"{100 * row['from']:.0f} % to {100 * row['from'] + 10:.0f} %"
        lines.append(f"| {tenth} | {row['n']} | {100 * row['mean']:.0f} % | {with_interval(row)} |")
    return "\n".join(lines)


def corruption_table(effects: list[Row]) -> str:
    """Every corruption's effect."""
    read = []
    for row in effects:
        estimates: Any = {key: Estimate(**cell) for key, cell in row.items() if isinstance(cell, dict)}
        read.append(robustness.Effect(**row | estimates))
    return robustness.to_markdown(read)


def corruption_sentence(effects: list[Row]) -> str:
    """Which corruptions cost most, at their worst severity."""
    clean, *corrupted = effects
    worst: dict[str, float] = {}
    for row in corrupted:
        name, accuracy = row["corruption"].partition(",")[0], row["accuracy"]["value"]
        worst[name] = min(accuracy, worst.get(name, 1))
    named = sorted(worst.items(), key=lambda item: item[1])[:WEAKEST]
    listed = ", ".join(f"{name} ({percent(accuracy)})" for name, accuracy in named)
    return f"Accuracy without corruption: {percent(clean['accuracy']['value'])}. The worst corruptions: {listed}."


def randomised_table(rows: dict[str, dict[str, float | None]]) -> str:
    """The likeness of each method's maps to those of a network that is random from a stage on."""
    stages = list(next(iter(rows.values())))
    lines = [f"| method | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
    for method, row in rows.items():
        cells = ("–" if (value := row[stage]) is None else f"{value:.2f}" for stage in stages)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(rows: dict[str, dict[str, float]]) -> str:
    """Each contender's median time, and its ratio to our label and heatmap with quartiles over the rounds."""
    lines = ["| from an opened picture | median, ms | times our label and heatmap (quartiles) |", "|---|---|---|"]
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
        lines.append(f"| {name} | {row['median_ms']:.1f} | {ratio} |")
    return "\n".join(lines)


def checkpoint_table(classifier: Classifier) -> str:
    """What the checkpoint itself says."""
    size = classifier.preprocessing.input_size
    created, counts = classifier.about["created"], classifier.about["trained_on"]
    low, high = classifier.not_sure
    return "\n".join(
        (
            "| | |",
            "|---|---|",
            f"| network | DenseNet121, two outputs, input {size} × {size} pixels |",
            f"| file | {DEFAULT_CHECKPOINT.stat().st_size / 1e6:.0f} MB, weights in half precision |",
            f"| SHA-256 | `{classifier.sha256}` |",
            f"| made on | {created} |",
            f"| trained on | {counts['meme']:,} memes, {counts['not_meme']:,} other pictures |",
            f"| label *meme* | from {percent(classifier.threshold)} on |",
            f"| *not sure* | between {percent(low)} and {percent(high)} |",
        )
    )


def tables() -> dict[str, str]:
    """Everything that is written into the documents, by name."""
    metrics, validation, effects, scores, speed = (
        json.loads((ROOT / "outputs" / f"{name}.json").read_text())
        for name in ("metrics", "validation", "robustness", "faithfulness", "speed")
    )
    kinds = {KINDS.get(name, f"{name}s"): row for name, row in metrics["groups"].items()}
    sources = {name.replace("__", "/"): row for name, row in metrics["sources"].items()}
    classifier = Classifier.load()
    size = classifier.preprocessing.input_size
    faithful = {
        method: {score: faithfulness.Interval(**row) for score, row in found.items()}
        for method, found in scores["scores"].items()
    }
    return {
        "accuracy": f"**{percent(metrics['accuracy']['value'])} right** on pictures from sources it never saw",
        "time": f"{speed['times']['our label and heatmap']['median_ms']:.0f} ms a picture on one CPU core",
        "input": f"{size} × {size} pixels",
        "in brief": figure_table(metrics, IN_BRIEF),
        "weaknesses": weakness_sentence(kinds),
        "checkpoint": checkpoint_table(classifier),
        "test set": f"{metrics['n']['meme']:,} memes and {metrics['n']['not_meme']:,} other pictures.",
        "figures": figure_table(metrics, tuple(FIGURES)),
        "means over sources": source_table(metrics["by_source"]),
        "legs": history_table(classifier.about["histories"]),
        "validation": source_table(validation["by_source"]),
        "improvement": improvement_table(validation["better_than_baseline"]),
        "strictness": strictness_table(metrics["strictness"]),
        "failures": failure_table(metrics, kinds, sources),
        "kinds": share_table("not memes", kinds),
        "sources": share_table("source of memes", sources),
        "languages": share_table(
            "language of memes", {LANGUAGES.get(key, key): row for key, row in metrics["languages"].items()}
        ),
        "calibration": calibration_table(metrics["calibration"]),
        "corruptions": corruption_table(effects["effects"]),
        "worst corruptions": corruption_sentence(effects["effects"]),
        "faithfulness": faithfulness.to_markdown(faithful),
        "faithfulness pictures": f"{scores['pictures']} validation pictures and {scores['drawn_memes']} drawn memes.",
        "randomised": randomised_table(scores["randomised"]),
        "speed": time_table(speed["times"]),
        "processor": f"{speed['processor']}, {speed['threads']} thread.",
    }


def fill(document: str) -> str:
    """Write every table and sentence between its two comments; on their line, if they stand on one line."""
    texts = tables()

    def filled(match: re.Match[str]) -> str:
        between = "\n\n" if "\n" in match[0] else ""
        return between.join((match["start"], texts[match["name"]], match["end"]))

    pattern = r"(?P<start><!-- (?P<name>[a-z ]+) -->).*?(?P<end><!-- /(?P=name) -->)"
    return re.sub(pattern, filled, document, flags=re.DOTALL)


def main() -> None:
    """Fill all documents."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
