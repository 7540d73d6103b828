import pytest

from benchmarks import folders


def test_all_pipelines_take_their_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(folders, "KINDS", {"few": (64, 5)})
    folders.compare(2)
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [cells[1] for cells in lines if cells[0] == "| few"] == [
        folders.USUAL,
        folders.OURS,
        folders.FAST,
        *(f"{step}, on one core" for step in ("read", "decode", "resize", "normalise", "network", "write")),
    ]
    (usual,) = [cells for cells in lines if cells[1:2] == [folders.USUAL]]
    assert usual[3] == "1.00 (1.00–1.00) |"


def test_a_larger_folder_gets_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    folders.scale([3])
    *_, row = capsys.readouterr().out.splitlines()
    _, pictures, seconds, rate, memory, _ = row.split("|")
    assert int(pictures) == 3
    assert float(rate) == pytest.approx(3 / float(seconds), abs=0.15)
    assert float(memory.replace(",", "")) > 200
