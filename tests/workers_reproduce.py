"""examples/reproduce on a rank of a pool, which has imported torch and Megatron-Core already."""

from __future__ import annotations

import contextlib
import io
import sys

from tiny import ROOT

sys.path.insert(0, str(ROOT / "examples" / "reproduce"))


def reproduce(*, words: list[str]) -> tuple[int, str, str]:
    """Exit code, output and error output of run.py."""
    import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run.main(words)
    return code, out.getvalue(), err.getvalue()
