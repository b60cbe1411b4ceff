"""Markdown pages: links, anchors, paths and imports exist, and the index lists every page."""

import ast
import re
from pathlib import Path

import pytest
from tiny import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
    ]
)
PACKAGE = ROOT / "minitron_mp"
FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir())
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join({*FOLDERS, *ROOMS})})/[\w./*-]*[\w*]")
"""A path that starts at a folder of the repository, or at a room of the package."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    """Return a page without its diffs, which name files that are yet to be written."""
    return re.sub(r"^```diff\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(path: str) -> bool:
    """Whether a path or pattern names something below the repository or below the package."""
    return any(root.exists() for root in (ROOT / path, PACKAGE / path)) or any(
        any(root.glob(path)) for root in (ROOT, PACKAGE)
    )


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pages
def test_paths_exist(page):
    missing = sorted(
        {path for path in PATH.findall(text_of(page)) if "NAME" not in path and not exists(path)}
    )
    assert missing == []


@pages
def test_imports_exist(page):
    """Names that a Python example imports from a module of the package are defined there."""
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minitron_mp."):
                assert {alias.name for alias in node.names} <= defined_names(node.module), node.module


def defined_names(module: str) -> set[str]:
    """Return the top-level names of a module, without importing it."""
    path = ROOT / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    names = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_index_lists_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
