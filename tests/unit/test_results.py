"""Shared results: computed once, and a failure is reported in full only once."""

from __future__ import annotations

import pytest
from cases import BY_NAME
from results import Results, SharedResultError


def test_result_is_computed_once(tmp_path):
    results = Results(ranks=None, root=tmp_path)
    calls = []
    assert [results.once(("key",), lambda: calls.append(1) or len(calls)) for _ in range(2)] == [1, 1]


def test_failed_result_names_its_first_test(tmp_path):
    """The first use raises with the cause.

    Later uses fail with one line and do not compute again.
    """
    results, key = Results(ranks=None, root=tmp_path), ("trained", "qwen3", BY_NAME["tp2"])
    with pytest.raises(SharedResultError, match="shared computation trained qwen3 tp2 failed") as error:
        results.once(key, lambda: 1 / 0)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    line = r"shared computation trained qwen3 tp2 failed; see .*test_failed_result_names_its_first_test$"
    with pytest.raises(pytest.fail.Exception, match=line):
        results.once(key, lambda: 2)
