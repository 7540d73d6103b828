import json
import shutil
from pathlib import Path

import pytest
from commands import run
from PIL import Image

from evaluation import evaluate
from evaluation.dataset import LabelledPicture, read_folder
from evaluation.evaluate import compare_by_source, format_report, measure
from model import MEME, NOT_MEME, NOT_SURE, Classifier, Prediction

THRESHOLDS = {"nearly_all": 0.2, "balanced": 0.5, "certain": 0.75}


def test_folders_name_label_group_and_source(folder: Path) -> None:
    found = {(p.label, p.group, p.source) for p in read_folder(folder)}
    assert found == {
        ("meme", "meme", "one"),
        ("meme", "meme", "two"),
        ("not_meme", "poster", "three"),
        ("not_meme", "four", "four"),
    }
    assert len(read_folder(folder)) == 16


def test_pictures_outside_any_source_belong_to_their_label(folder: Path) -> None:
    (folder / "meme" / "one" / "0.png").rename(folder / "meme" / "loose.png")
    loose = [p for p in read_folder(folder) if p.path.name == "loose.png"]
    assert [(p.group, p.source) for p in loose] == [("meme", "meme")]


def test_figures_of_a_known_outcome() -> None:
    """Four memes, three of them found; six others, one of them called a meme."""
    pictures = [LabelledPicture(Path(f"test/meme/reddit/{n}.png"), MEME, MEME, "reddit") for n in range(4)]
    pictures += [LabelledPicture(Path(str(n)), NOT_MEME, "chart", "nature") for n in range(2)]
    pictures += [LabelledPicture(Path(str(n)), NOT_MEME, "photo", "flickr") for n in range(4)]
    scores = [0.9, 0.8, 0.7, 0.2, 0.6, 0.1, 0.3, 0.1, 0.1, 0.1]
    predictions = [
        Prediction(label := MEME if s >= 0.5 else NOT_MEME, s, NOT_SURE if s in (0.6, 0.3) else label) for s in scores
    ]
    languages: dict[tuple[str, ...], str] = {
        ("meme", "reddit", "2.png"): "pt",
        ("meme", "reddit", "3.png"): "pt",
        ("meme", "other", "0.png"): "en",
    }
    figures = measure(pictures, predictions, THRESHOLDS, languages)
    assert figures["n"] == {"meme": 4, "not_meme": 6}
    assert figures["accuracy"]["value"] == pytest.approx(8 / 10)
    assert figures["precision"]["value"] == pytest.approx(3 / 4)
    assert figures["recall"]["value"] == pytest.approx(3 / 4)
    assert figures["f1"]["value"] == pytest.approx(3 / 4)
    assert figures["auroc"]["value"] == pytest.approx((6 + 6 + 6 + 4) / 24)
    assert figures["brier"]["value"] == pytest.approx(sum((s - (n < 4)) ** 2 for n, s in enumerate(scores)) / 10)
    assert figures["share_answered"]["value"] == pytest.approx(8 / 10)
    assert figures["accuracy_when_answered"]["value"] == pytest.approx(7 / 8)
    assert {name: (row["n"], row["accuracy"]) for name, row in figures["groups"].items()} == {
        "chart": (2, 0.5),
        "photo": (4, 1.0),
    }
    assert {name: (row["n"], row["accuracy"]) for name, row in figures["sources"].items()} == {"reddit": (4, 0.75)}
    assert {name: (row["n"], row["accuracy"]) for name, row in figures["languages"].items()} == {"pt": (2, 0.5)}
    assert figures["text_negatives"]["value"] == pytest.approx(1 / 2)  # the charts
    tenths = {row["from"]: (row["n"], round(row["mean"], 6), row["value"]) for row in figures["calibration"]}
    assert tenths == {
        0.1: (4, 0.1, 0),
        0.2: (1, 0.2, 1),
        0.3: (1, 0.3, 0),
        0.6: (1, 0.6, 0),
        0.7: (1, 0.7, 1),
        0.8: (1, 0.8, 1),
        0.9: (1, 0.9, 1),
    }
    assert {
        name: (row["threshold"], row["recall"]["value"], round(row["precision"]["value"], 6))
        for name, row in figures["strictness"].items()
    } == {"nearly_all": (0.2, 1, round(4 / 6, 6)), "balanced": (0.5, 0.75, 0.75), "certain": (0.75, 0.5, 1)}
    by_source = figures["by_source"]
    assert by_source["sources"] == {"meme": 1, "not_meme": 2}
    assert by_source["recall"]["value"] == pytest.approx(3 / 4)
    assert by_source["specificity"]["value"] == pytest.approx((1 / 2 + 4 / 4) / 2)
    assert by_source["accuracy"]["value"] == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert by_source["auroc"]["value"] == pytest.approx((7 / 8 + 15 / 16) / 2)  # against charts, against photos
    for name in ("accuracy", "precision", "recall", "f1", "auroc", "average_precision", "ece", "brier"):
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]


def answers(scores: list[float]) -> list[Prediction]:
    return [Prediction(label := MEME if s >= 0.5 else NOT_MEME, s, label) for s in scores]


def test_a_comparison_resamples_the_same_sources_for_both() -> None:
    """A checkpoint that is better on every source is better with certainty; one that is right elsewhere is not."""
    pictures = [
        LabelledPicture(Path(str(n)), label, label, f"{label}-{source}")
        for label in (MEME, NOT_MEME)
        for source in range(6)
        for n in range(4)
    ]
    truth = [picture.label == MEME for picture in pictures]

    def wrong_on(chosen: set[int]) -> list[float]:
        return [float(is_meme != (n in chosen)) * 0.8 + 0.1 for n, is_meme in enumerate(truth)]

    baseline = wrong_on({n for n in range(48) if n % 4 < 2})  # two of four in each source
    better = compare_by_source(pictures, answers(wrong_on({n for n in range(48) if n % 4 < 1})), answers(baseline))
    assert better["accuracy"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    elsewhere = compare_by_source(pictures, answers(wrong_on(set(range(0, 48, 8)))), answers(wrong_on({4, 12, 20})))
    assert elsewhere["accuracy"]["low"] < 0 <= elsewhere["accuracy"]["high"]


def test_the_command_leaves_out_known_sources_and_compares_with_a_baseline(
    folder: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = tmp_path / "known"
    shutil.copytree(folder / "meme" / "one", known / "meme" / "one")
    shutil.copytree(folder / "not_meme" / "four", known / "not_meme" / "four")
    out = tmp_path / "metrics.json"
    arguments = (folder, "--train", known, "--checkpoint", tiny_checkpoint, "--baseline", tiny_checkpoint)
    assert run(monkeypatch, evaluate.main, None, *arguments, "--json", out) == 0
    figures = json.loads(out.read_text())
    assert figures["n"] == {"meme": 4, "not_meme": 4}
    assert figures["by_source"]["sources"] == {"meme": 1, "not_meme": 1}
    assert figures["better_than_baseline"]["auroc"] == {"value": 0, "low": 0, "high": 0}
    assert "Better than the baseline by" in capsys.readouterr().out


def test_the_command_writes_figures_and_plot(
    folder: Path,
    tiny_classifier: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (folder / "meme" / "one" / "broken.png").write_bytes(b"no picture")
    out, plot, index = tmp_path / "out" / "metrics.json", tmp_path / "metrics.png", tmp_path / "index.csv"
    index.write_text("file,language\ntrain/meme/one/1.png,ru\ntrain/meme/one/2.png,\n")
    arguments = (folder, "--json", out, "--plot", plot, "--languages", index)
    assert run(monkeypatch, evaluate.main, tiny_classifier, *arguments) == 0
    figures = json.loads(out.read_text())
    assert figures["n"] == {"meme": 8, "not_meme": 8}
    assert figures["unreadable"] == 1
    assert figures["languages"]["ru"]["n"] == 1
    printed = capsys.readouterr()
    assert "broken.png: This file is not a picture" in printed.err
    assert f"{figures['accuracy']['value']:.4f}" in printed.out
    assert "poster (4)" in printed.out
    with Image.open(plot) as drawn:
        assert drawn.size == (1200, 760)


def test_negatives_alone_can_be_measured(
    folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "meme").rename(tmp_path / "elsewhere")
    out = tmp_path / "metrics.json"
    assert (
        run(monkeypatch, evaluate.main, tiny_classifier, folder, "--json", out, "--plot", tmp_path / "metrics.png") == 0
    )
    figures = json.loads(out.read_text())
    assert figures["auroc"] == {"value": None, "low": None, "high": None}
    assert figures["accuracy"]["value"] is not None
    assert "not defined" in format_report(figures)


def test_an_empty_folder_is_wrong_usage(
    tmp_path: Path,
    tiny_classifier: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, evaluate.main, tiny_classifier, tmp_path)
    assert stop.value.code == 2
    assert "there are no pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table", [b"path,tongue\na,b\n", b"language,file\nen\n", "file,language\né,fr\n".encode("latin-1")]
)
def test_a_table_without_languages_is_wrong_usage(
    table: bytes, folder: Path, tiny_classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.csv").write_bytes(table)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, evaluate.main, tiny_classifier, folder, "--languages", tmp_path / "index.csv")
    assert stop.value.code == 2
