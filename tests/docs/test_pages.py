"""Markdown pages name what exists: links, paths, imports, recipe keys, metrics and rooms."""

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from test_rooms import ONLY_IN, ROOMS
from tiny import ROOT

from minitron_mp.config.base import Section
from minitron_mp.config.recipe import Recipe
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.parameters import PARAMETERS
from minitron_mp.models.families import FAMILIES
from minitron_mp.pruning.aggregation import BATCH_AGGREGATIONS, SEQUENCE_AGGREGATIONS
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.throughput import Throughput


def sections_of(annotation: Any) -> list[type[Section]]:
    """Return the sections of a recipe in a type such as SearchConfig | None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
    ]
)
CODE = ("minitron_mp", "tests", "examples", "experiments", "launch", "benchmarks", "docker")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join([*CODE, *ROOMS, 'docs', 'constraints'])})/[\w./*-]*[\w*]")
"""A path that starts at a folder of the repository, or at a room of the package."""
USERS_FILES = {"launch/site/local.env"}
SECTIONS = [name for name, field in Recipe.model_fields.items() if sections_of(field.annotation)]
FILE_SUFFIXES = {"json", "md", "py", "yaml", "bin", "idx"}
"""Last parts of names such as plan.json, which are no recipe keys."""

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
    return any(any(root.glob(path)) for root in (ROOT, ROOT / "minitron_mp"))


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
    paths = {path for path in PATH.findall(text_of(page)) if not exists(path) and "NAME" not in path}
    assert paths - USERS_FILES == set()


def test_pages_named_in_code_exist():
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*"))]
    for path in files:
        if path.suffix in (".py", ".sh", ".sbatch", ".env", ".yaml"):
            named = re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8"))
            assert [page for page in named if not (ROOT / page).is_file()] == [], path


@pages
def test_imports_exist(page):
    """Names that a Python example imports from a module of the package are defined there."""
    for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minitron_mp."):
                assert {alias.name for alias in node.names} <= defined_names(node.module), node.module


@pages
def test_named_functions_are_in_the_named_file(page):
    """`name` in `path.py`, also with several names before one path: each is defined in that file."""
    name = r"`\w+(?:\([^`]*\))?`"
    listed = rf"({name}(?:(?:,| and|, and| or)\s+{name})*)\s+(?:is\s+|are\s+)?(?:in|of)\s+`([\w/]+\.py)`"
    wrong = []
    for names, path in re.findall(listed, text_of(page)):
        (file,) = (root / path for root in (ROOT, ROOT / "minitron_mp") if (root / path).is_file())
        source = file.read_text(encoding="utf-8")
        for found in re.findall(r"`(\w+)", names):
            if not re.search(rf"^\s*(?:def|class) {found}\b|^{found}\b.* = ", source, re.M):
                wrong.append((found, path))
    assert wrong == []


@pages
def test_recipe_keys_exist(page):
    """Keys written as section.key are keys of the recipe."""
    if page.name == "errors.md":
        pytest.skip("it shows mistakes")
    text = re.sub(r"^```python\n.*?^```", "", text_of(page), flags=re.M | re.S)
    found = re.findall(rf"(?<![\w./-])((?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?![\w(/])", text)
    keys = {key for key in found if key.split(".")[-1] not in FILE_SUFFIXES}
    added = set(re.findall(r"^\+    (\w+): ", page.read_text(encoding="utf-8"), re.M))  # by a diff
    assert {key for key in keys if not is_recipe_key(key) and key.split(".")[-1] not in added} == set()


def is_recipe_key(key: str) -> bool:
    sections = [Recipe]
    first, *rest = key.split(".")
    names = [first, *rest[1:]] if first == "rounds" else [first, *rest]  # without the name of the round
    for name in names:
        fields = [section.model_fields[name] for section in sections if name in section.model_fields]
        if not fields:
            return False
        sections = [each for field in fields for each in sections_of(field.annotation)]
        if not sections:  # the rest of the key is a name that the user chooses
            return True
    return True


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
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= set(ast.literal_eval(node.value))
    return names


@pages
def test_prose_has_at_most_100_columns(page):
    """Tables and code blocks may be wider."""
    if "paper_claims" in page.parts:
        pytest.skip("a program writes this page")
    prose = re.sub(r"^```.*?^```|^\|.*?$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert [line for line in prose.splitlines() if len(line) > 100] == []


def test_index_lists_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}


def rows_below(page: str, header: str) -> list[list[str]]:
    """Return the cells of the table with this header. \\| in a cell separates no cells."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n{header}\n")[1]
    lines = text.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_readme_lists_every_family():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"^\* Dense decoders of these families: (.*?)\.", text, re.M | re.S)
    assert re.split(r",\s+", names) == [family.title for family in FAMILIES.values()]


def test_distillation_page_lists_every_divergence():
    """With its parameters, and the number of all-gathers: one more for second sums."""
    rows = rows_below("docs/distillation.md", "| divergence | formula | parameters | all-gathers |")
    assert [(name, parameters, gathers) for name, _, parameters, gathers in rows] == [
        (
            f"`{name}`",
            "; ".join(
                f"`{key}` above {limits.above:g} and at most {limits.at_most:g}, default {limits.default:g}"
                for key, limits in PARAMETERS.get(name, {}).items()
            ),
            "1" if formulas.second_sums is None else "2",
        )
        for name, formulas in DIVERGENCES.items()
    ]


def test_pruning_page_lists_every_aggregation():
    header = (
        "| aggregation | over the sequence: `score.sequence_aggregation` "
        "| over samples: `score.batch_aggregation` |"
    )
    rows = rows_below("docs/pruning.md", header)
    for column, table in ((1, SEQUENCE_AGGREGATIONS), (2, BATCH_AGGREGATIONS)):
        assert {row[0] for row in rows if row[column]} == {f"`{name}`" for name in table}


def test_metrics_page_lists_every_column():
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    table = page.split("| column | unit | definition |")[1].split("\n\n")[0]
    rows = [row.split("|")[1] for row in table.strip().splitlines()[1:]]
    columns = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    logged = {field.name for kind in (StepMetrics, Throughput) for field in fields(kind)}
    logged -= {"measured", "divergence", "divergence_name"}
    assert sorted(columns) == sorted({*logged, "time", "spike_over", "forward_kl"})


def test_contributing_lists_rooms_in_import_order():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| room | subject |")[1]
    first_column = "".join(row.split("|")[1] for row in table.split("\n\n")[0].strip().splitlines()[1:])
    assert re.findall(r"`(\w+)", first_column) == ROOMS


def test_contributing_lists_where_libraries_are_imported():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| library | where |")[1]
    rows = [row.split("|")[1:3] for row in table.split("\n\n")[0].strip().splitlines()[1:]]
    for library, places in rows:
        name = library.strip(" `")
        allowed = re.findall(r"`([\w/]+?)/?(?:\.py)?`", places)
        assert all(any(file.startswith(place) for place in allowed) for file in ONLY_IN[name]), name
