import hashlib
import json
import re

import pytest
from pictures import ROOT

from evaluation import report
from model import DEFAULT_CHECKPOINT


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_the_documents_have_the_measured_figures(name: str) -> None:
    document = (ROOT / name).read_text(encoding="utf-8")
    assert report.fill(document) == document


@pytest.mark.parametrize("name", ["metrics", "validation", "robustness", "faithfulness"])
def test_the_figures_belong_to_the_shipped_checkpoint(name: str) -> None:
    figures = json.loads((ROOT / "outputs" / f"{name}.json").read_text())
    assert figures["checkpoint_sha256"] == hashlib.sha256(DEFAULT_CHECKPOINT.read_bytes()).hexdigest()


def test_each_table_stands_in_exactly_one_document() -> None:
    documents = "".join((ROOT / name).read_text(encoding="utf-8") for name in report.DOCUMENTS)
    for name in report.tables():
        assert documents.count(f"<!-- {name} -->") == documents.count(f"<!-- /{name} -->") == 1, name


def test_old_figures_are_replaced_between_their_comments_only() -> None:
    in_line = report.fill("Before <!-- input -->an old figure<!-- /input --> after.")
    assert re.fullmatch(r"Before <!-- input -->\d+ × \d+ pixels<!-- /input --> after\.", in_line)
    block = report.fill("Before\n\n<!-- in brief -->\nan old table\n<!-- /in brief -->\n\nAfter\n")
    assert block.startswith("Before\n\n<!-- in brief -->\n\n| figure |")
    assert block.endswith(" |\n\n<!-- /in brief -->\n\nAfter\n")
    assert "old" not in in_line + block


def test_shares_are_written_in_percent() -> None:
    assert report.with_interval({"value": 0.907, "low": 0.898, "high": 0.9157}) == "90.7 % (89.8 % to 91.6 %)"
    assert report.with_interval({"value": None, "low": None, "high": None}) == "–"


def test_means_over_sources_say_how_many_sources() -> None:
    value = {"value": 0.9, "low": 0.85, "high": 0.95}
    means = {"sources": {"meme": 11, "not_meme": 45}} | dict.fromkeys(report.SOURCE_FIGURES, value)
    table = report.source_table(means)
    assert "11 sources of memes and 45 of others" in table
    assert "| memes found | 90.0 % (85.0 % to 95.0 %) |" in table
    assert table.endswith("| 0.900 (0.850 to 0.950) |")


def test_the_training_is_told_by_the_end_of_each_network() -> None:
    history = [
        {"pictures": draws, "loss": 1.0, "validation_accuracy": 0.9, "validation_auroc": draws / 1e5}
        for draws in (12_800, 25_600)
    ]
    assert report.history_table({"leg 1": history}).endswith("\n| leg 1 | 25,600 | 90.0 % | 0.256 |")


def test_an_improvement_is_in_percentage_points() -> None:
    better = {key: {"value": 0.021, "low": -0.004, "high": 0.046} for key in ("accuracy", "auroc")}
    table = report.improvement_table(better)
    assert "| accuracy, percentage points | 2.1 (-0.4 to 4.6) |" in table
    assert "| AUROC | 0.021 (-0.004 to 0.046) |" in table


def test_strictness_settings_have_their_threshold() -> None:
    value = {"value": 0.9, "low": 0.85, "high": 0.95}
    rows = {key: {"threshold": 0.42, "recall": value, "precision": value} for key in report.STRICTNESS}
    assert report.strictness_table(rows).count("| 42.0 % | 90.0 % (85.0 % to 95.0 %) | 90.0 %") == 3


def test_the_weakest_groups_are_the_largest_shares_of_errors() -> None:
    rows = {
        "cards": {"n": 200, "accuracy": 0.7},
        "charts": {"n": 100, "accuracy": 0.99},
        "logos": {"n": report.MIN_WEAK - 1, "accuracy": 0.1},
        "posters": {"n": 100, "accuracy": 0.8},
        "slides": {"n": 100, "accuracy": 0.6},
    }
    assert [name for name, _ in report.weakest(rows)] == ["slides", "cards", "posters"]
    assert report.weakness_sentence(rows).endswith("slides (40.0 %), cards (30.0 %), posters (20.0 %).")


def test_failures_add_up_to_all_errors() -> None:
    kinds = {
        name: {"n": 100, "accuracy": 1 - errors / 100} for name, errors in zip("abcde", (1, 2, 3, 4, 5), strict=True)
    }
    sources = {"one": {"n": 80, "accuracy": 0.75}}
    table = report.failure_table({"n": {"meme": 90, "not_meme": 500}}, kinds, sources)
    assert "| e: called a meme | 5 of 100 |" in table
    assert "| all others: called a meme | 3 of 200 |" in table
    assert "| one: meme missed | 20 of 80 |" in table
    assert "| all others: meme missed | 0 of 10 |" in table
