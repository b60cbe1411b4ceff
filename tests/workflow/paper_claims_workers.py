"""Run experiments/paper_claims on a pool rank, which has imported Megatron-Core already."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace
from unittest.mock import patch

from tiny import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "paper_claims"))


FEW = ("pruned", "scores var mean", "random scores")
"""Variants of the claim `scores`. The others differ in one word of the recipe and cost 1 s each."""


def reproduce(*, words: list[str]) -> tuple[int, str, str]:
    """Exit code, output and error output of run.py."""
    import run

    out, err = io.StringIO(), io.StringIO()
    few = {"scores": replace(run.CLAIMS["scores"], variants=FEW)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch.dict(run.CLAIMS, few):
        code = run.main(words)
    return code, out.getvalue(), err.getvalue()
