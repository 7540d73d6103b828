"""README stays one page, and what it says can be done as it stands."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import ROOT
from PIL import Image

import images

DOCUMENTS = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Modules that read a command line.
WING_COMMANDS = sorted(
    path
    for wing in ("training", "evaluation", "benchmarks")
    for path in (ROOT / wing).glob("*.py")
    if "ArgumentParser" in path.read_text()
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose(document: str) -> list[str]:
    """The paragraphs of a document, without code blocks, tables, headings, pictures and marks."""
    text = re.sub(r"<!--.*?-->", "", BLOCK.sub("", document))
    text = LINK.sub(lambda link: link[0][1 : link[0].index("](")], re.sub(r"!\[.*?\]\(.*?\)", "", text))
    paragraphs = [part for block in re.split(r"\n\s*\n", text) for part in re.split(r"\n(?=- |\d\. )", block)]
    return [
        " ".join(re.sub(r"[*`]", "", part).split())
        for part in paragraphs
        if part.strip() and not part.lstrip().startswith(("#", "|"))
    ]


def anchors(document: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_it_is_one_page() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 8 * 1024
    for paragraph in prose(README):
        assert len(paragraph.split()) <= 60, paragraph
        for sentence in re.split(r"(?<=[.?!:])\s", paragraph):
            assert len(sentence.split()) <= 30, sentence


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    document = path.read_text(encoding="utf-8")
    for link in LINK.findall(document):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    document = path.read_text(encoding="utf-8")
    for command in re.findall(r"python -m ((?:training|evaluation|benchmarks)\.\w+)", document):
        assert (ROOT / f"{command.replace('.', '/')}.py").exists(), command
    for script in re.findall(r"(?:python|streamlit run) (\w+\.py)", document):
        assert (ROOT / script).exists(), script
    for file in re.findall(r"requirements[-\w]*\.(?:txt|lock)", document):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", ["classify", *(f"{path.parent.name}.{path.stem}" for path in WING_COMMANDS)])
def test_options_exist(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    called = re.compile(rf"python (?:-m )?{re.escape(name)}(?:\.py)?\b([^`|\n]*)")
    for path in DOCUMENTS:
        for arguments in called.findall(path.read_text(encoding="utf-8")):
            assert set(re.findall(r"(?<=\s)--[\w-]+", arguments.partition("#")[0])) <= set(known), arguments


def test_the_python_example_runs_as_it_stands(tmp_path: Path) -> None:
    ((_, example),) = [block for block in BLOCK.findall(README) if block[0] == "python"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "verdict='meme'" in ran.stdout
    with Image.open(tmp_path / "heatmap.png") as heatmap, Image.open(ROOT / "examples" / "cat_meme.jpg") as picture:
        assert heatmap.size == picture.size


def test_its_picture_fits_on_a_screen() -> None:
    (name,) = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    with Image.open(ROOT / name) as picture:
        assert picture.height <= 640


def test_messages_under_troubleshooting_are_the_programs_own() -> None:
    table = README.partition("## Troubleshooting")[2].partition("##")[0]
    messages = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")]
    ours = [message for message in messages[1:] if "`" not in message]
    fragments = [part.strip() for message in ours for part in re.split("…| / ", message) if part.strip()]
    sources = [path for folder in (ROOT, ROOT / "formats") for path in folder.glob("*.py")]
    said = images.MEGAPIXELS + "".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(fragments) >= 5
    assert [fragment for fragment in fragments if fragment not in said] == []
