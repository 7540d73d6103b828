"""The rule of imports: workshops look towards the root, never the other way, and never sideways.

photo_library is no workshop but a part of classify.py, some of which needs packages of its own.
"""

import ast
from pathlib import Path

import pytest
from pictures import ROOT

# What each folder may import besides itself and the root.
ALLOWED = {
    "": {"formats", "photo_library"},
    "formats": set[str](),
    "photo_library": set[str](),
    "evaluation": set[str](),
    "training": {"evaluation"},
    "benchmarks": {"evaluation"},
}
SOURCES = [(folder, path) for folder in ALLOWED for path in sorted((ROOT / folder).glob("*.py"))]


def imported(source: str) -> set[str]:
    """The top-level names of all modules that a source imports, anywhere in it."""
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize(("folder", "path"), SOURCES, ids=lambda value: getattr(value, "name", value or "root"))
def test_imports_go_one_way(folder: str, path: Path) -> None:
    wings = set(filter(None, ALLOWED))
    assert imported(path.read_text()) & wings <= ALLOWED[folder] | ({folder} if folder else set())


def test_the_root_holds_the_product() -> None:
    product = "app borders classify cluster engine gallery gradcam images model serve sessions tables"
    assert {path.stem for path in ROOT.glob("*.py")} == set(product.split())


def test_formats_stand_alone() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")}
    for path in (ROOT / "formats").glob("*.py"):
        assert not imported(path.read_text()) & modules
