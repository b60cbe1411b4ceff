"""A hundred mistakes of users, and the messages that they get. docs/errors.md shows all of them.

After a message has changed, MINITRON_WRITE_PAGES=1 writes the page again.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from mistakes import MISTAKES, Mistake, all_mistakes
from tiny import ROOT, make_model, make_recipe_file, make_text

from minitron_mp.cli import main

PAGE = ROOT / "docs" / "errors.md"
HEADER = """\
# Error messages

What the command line answers to common mistakes. Every message contains what was given, what is
allowed, and what to do. `tests/workflow/mistakes.py` makes each mistake in a small project, and a
test compares the answers with this page. The exit code is 2, and no stage has run.
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A small project with relative paths."""
    root = tmp_path_factory.mktemp("mistakes")
    make_model(root / "model")
    make_text(root / "text")
    make_recipe_file(root / "recipe.yaml", Path("model"), Path("text"), Path("out"))
    return root


@pytest.fixture
def answer(project, tmp_path, monkeypatch, capsys):
    """answer(mistake) makes a mistake in a copy of the project: (exit code, error output)."""

    def run(mistake: Mistake) -> tuple[int, str]:
        folder = shutil.copytree(project, tmp_path / "project")
        mistake.change(folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["minitron-mp", *mistake.arguments()])
        monkeypatch.setenv("COLUMNS", "160")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, err.replace(str(folder), "/project")

    return run


def entry(mistake: Mistake, message: str) -> str:
    words = " ".join(f"'{word}'" if set(word) & set(" {}[]$'\"#?") else word for word in mistake.arguments())
    return f"### {mistake.title}\n\n```\n$ minitron-mp {words}\n{message.strip()}\n```\n"


@pytest.mark.parametrize(
    ("area", "mistake"), [pytest.param(*row, id=f"{row[0]}: {row[1].title}") for row in all_mistakes()]
)
def test_mistake_is_answered_as_on_the_page(answer, area, mistake):
    code, message = answer(mistake)
    assert code == 2, message
    assert message.startswith("error: ")
    text = entry(mistake, message)
    if os.environ.get("MINITRON_WRITE_PAGES"):
        answers[area, mistake.title] = text
        return
    assert text in PAGE.read_text(), f"docs/errors.md has another answer or none; now:\n{text}"


answers: dict[tuple[str, str], str] = {}


def test_page_has_these_mistakes_in_this_order():
    """At least 100 different ones."""
    titles = [(area, mistake.title) for area, mistake in all_mistakes()]
    assert len(set(titles)) == len(titles) >= 100
    if os.environ.get("MINITRON_WRITE_PAGES"):
        sections = [
            f"## {area}\n\n" + "\n".join(answers[area, mistake.title] for mistake in mistakes)
            for area, mistakes in MISTAKES.items()
        ]
        PAGE.write_text("\n".join([HEADER, *sections]))
    lines = PAGE.read_text().splitlines()
    expected = [
        line
        for area, rows in MISTAKES.items()
        for line in (f"## {area}", *(f"### {row.title}" for row in rows))
    ]
    assert [line for line in lines if line.startswith("##")] == expected
