"""docs/extending.md: the diff of each section applies to the repository, and its addition works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from extending_checks import CHECKS
from tiny import ROOT, environment

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
MOST_ADDED_LINES = 45
COPIED = ("minitron_mp", "tests", "pyproject.toml")
"""What the diffs change, and what the checks need."""


def sections() -> dict[str, str]:
    """Return the last word of each heading -> the text below it."""
    parts = re.split(r"^## .*?(\w+)\n", PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def diff_of(section: str) -> str:
    """Return the one diff of a section."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```", sections()[section], re.M | re.S)
    return diff


def copy_repository(folder: Path) -> None:
    for name in COPIED:
        source, copy = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)


def run(folder: Path, *words: str | Path, text: str | None = None) -> None:
    paths = f"{folder}:{folder / 'tests' / 'support'}"
    done = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env={**environment(), "PYTHONPATH": paths, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_section_has_a_checked_diff():
    assert [name for name, text in sections().items() if "```diff" in text] == list(CHECKS)
    assert list(sections()) == list(CHECKS)


def test_loss_diff_applies_after_another_divergence(tmp_path):
    """Also if a helper of the other one stands below the table."""
    copy_repository(tmp_path)
    diff = diff_of("loss")
    formulas = tmp_path / "minitron_mp" / "losses" / "divergences.py"
    run(tmp_path, "git", "apply", "-", text=diff.replace("hellinger", "other"))
    formulas.write_text(formulas.read_text(encoding="utf-8") + "\n\ndef helper() -> None: ...\n")
    run(tmp_path, "git", "apply", "-", text=diff)
    table = formulas.read_text(encoding="utf-8")
    assert re.findall(r'^    "(\w+)": Divergence\(', table, re.M)[-2:] == ["other", "hellinger"]


SLOW = ("criterion", "stage")
"""Sections whose checks are slow tests."""


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CHECKS]
)
def test_diff_applies_and_its_addition_works(section, tmp_path):
    copy_repository(tmp_path)
    diff = diff_of(section)
    assert len(re.findall(r"^\+(?!\+\+ )", diff, re.M)) <= MOST_ADDED_LINES
    run(tmp_path, "git", "apply", "-", text=diff)
    changed = re.findall(r"^\+\+\+ b/(.*)$", diff, re.M)
    run(tmp_path, sys.executable, "-m", "ruff", "check", *changed)
    run(tmp_path, sys.executable, "-m", "ruff", "format", "--check", *changed)
    run(tmp_path, sys.executable, "tests/docs/extending_checks.py", section)
