import hashlib
import json

import pytest
from pictures import ROOT

from evaluation import report
from model import DEFAULT_CHECKPOINT


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_the_documents_have_the_figures_that_were_measured(name: str) -> None:
    document = (ROOT / name).read_text(encoding="utf-8")
    assert report.filled(document) == document


@pytest.mark.parametrize("name", ["metrics", "robustness", "faithfulness"])
def test_the_figures_are_of_the_shipped_checkpoint(name: str) -> None:
    figures = json.loads((ROOT / "outputs" / f"{name}.json").read_text())
    assert figures["checkpoint_sha256"] == hashlib.sha256(DEFAULT_CHECKPOINT.read_bytes()).hexdigest()


def test_every_table_stands_somewhere() -> None:
    documents = "".join((ROOT / name).read_text(encoding="utf-8") for name in report.DOCUMENTS)
    for name, table in report.tables().items():
        assert table in documents, name
    assert report.percent(0.907, 0.898, 0.9157) == "90.7 % (89.8 % to 91.6 %)"
