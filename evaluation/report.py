"""Write the figures of outputs/*.json into README.md and MODEL_CARD.md: python -m evaluation.report

Each table stands between a comment with its name and one with a slash before it.
"""

import json
import re
from pathlib import Path
from typing import Any

from evaluation import faithfulness, robustness
from evaluation.metrics import Estimate

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "MODEL_CARD.md")
FIGURES = {
    "accuracy": "accuracy",
    "precision": "precision (of those called memes, how many are)",
    "recall": "recall (of the memes, how many are found)",
    "f1": "F1",
    "text_negatives": "negatives that carry text (all groups below but photo and graphic), called not a meme",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "accuracy_when_answered": "accuracy where it answers, outside *not sure*",
    "share_answered": "share that it answers",
    "ece": "calibration error, ECE (noise floor {ece_noise_floor:.3f})",
    "brier": "Brier score",
}
NOT_IN_PERCENT = ("auroc", "average_precision", "ece", "brier")
LANGUAGES = {"en": "English", "es": "Spanish", "ru": "Russian", "pl": "Polish", "pt": "Portuguese"}
IN_BRIEF = ["deletion, blur", "insertion, blur", "ROAD", "pointing game", "energy in captions"]


def percent(value: float, low: float, high: float) -> str:
    """A share with its interval."""
    return f"{value:.1%} ({low:.1%} to {high:.1%})".replace("%", " %")


def headline(metrics: dict[str, Any]) -> str:
    """All single figures."""
    lines = ["| figure | value (95 % interval) |", "|---|---|"]
    for key, words in FIGURES.items():
        value, low, high = (metrics[key][part] for part in ("value", "low", "high"))
        shown = f"{value:.3f} ({low:.3f} to {high:.3f})" if key in NOT_IN_PERCENT else percent(value, low, high)
        lines.append(f"| {words.format(**metrics)} | {shown} |")
    return "\n".join(lines)


def parts(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Shares by group, source or language, the highest first."""
    lines = [f"| {title} | pictures | right |", "|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["accuracy"]):
        lines.append(f"| {name} | {row['n']} | {percent(row['accuracy'], row['low'], row['high'])} |")
    return "\n".join(lines)


def calibration(rows: list[dict[str, Any]]) -> str:
    """What became of the pictures that were given a probability in each tenth."""
    lines = ["| probability of meme | pictures | mean probability | memes among them |", "|---|---|---|---|"]
    for row in rows:
        tenth, mean = f"{row['from']:.0%} to {row['from'] + 0.1:.0%}", f"{row['mean']:.0%}"
        memes = percent(row["value"], row["low"], row["high"])
        lines.append(f"| {tenth.replace('%', ' %')} | {row['n']} | {mean.replace('%', ' %')} | {memes} |")
    return "\n".join(lines)


def effect(row: dict[str, Any]) -> robustness.Effect:
    """A corruption's effect as it was before it went to a file."""
    estimates: Any = {key: Estimate(**cell) for key, cell in row.items() if isinstance(cell, dict)}
    return robustness.Effect(**row | estimates)


def tables() -> dict[str, str]:
    """Every table by its name."""
    metrics, effects, scores = (
        json.loads((ROOT / "outputs" / f"{name}.json").read_text())
        for name in ("metrics", "robustness", "faithfulness")
    )
    faithful = {
        method: {score: faithfulness.Interval(**row) for score, row in found.items()}
        for method, found in scores["scores"].items()
    }
    return {
        "headline": headline(metrics),
        "groups": parts("not memes", metrics["groups"]),
        "sources": parts("source of memes", {k.replace("__", "/"): row for k, row in metrics["sources"].items()}),
        "languages": parts("language of memes", {LANGUAGES.get(k, k): row for k, row in metrics["languages"].items()}),
        "calibration": calibration(metrics["calibration"]),
        "corruptions": robustness.in_words([effect(row) for row in effects["effects"]]),
        "faithfulness": faithfulness.in_words(faithful),
        "faithfulness in brief": faithfulness.in_words(faithful, IN_BRIEF),
    }


def filled(document: str) -> str:
    """A document with every table as it should be."""
    for name, table in tables().items():
        document = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>\n{table}\n\n\g<2>", document, flags=re.DOTALL
        )
    return document


def main() -> None:
    """Write."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
