"""Fixtures that several files of this folder share."""

from __future__ import annotations

import shutil

import pytest
from tiny import Run, make_recipe_file


@pytest.fixture
def copied(whole, inputs, tmp_path) -> Run:
    """The finished project and its model, to damage."""
    assert whole.done.returncode == 0, whole.done.stderr
    shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copytree(whole.output, tmp_path / "out")
    # The path of the text is a setting of the data stage, so it stays the same word.
    return Run(
        make_recipe_file(tmp_path / "recipe.yaml", tmp_path / "model", inputs / "text", tmp_path / "out"),
        tmp_path / "out",
    )


@pytest.fixture
def on_rank(ranks):
    """on_rank(words...) runs the command line on one pool rank."""
    return lambda *words, **options: ranks(
        1, "project_workers.minitron", arguments=[str(word) for word in words], **options
    )[0]


@pytest.fixture
def in_job(ranks):
    """in_job(count, words...) runs the command line on pool ranks, which make their own worlds."""
    return lambda count, *words: ranks(
        count, "project_workers.minitron", arguments=[str(word) for word in words], own_job=True
    )
