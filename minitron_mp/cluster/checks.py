"""Results of checks, and the merge of the results of all ranks into one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class CheckResult:
    """A row of the doctor's table."""

    check: str
    verdict: Verdict
    detail: str
    advice: str = ""
    """Text for the column "what to do"; empty if there is nothing to do."""


def ok(check: str, detail: str) -> CheckResult:
    """Return the result of a check that passed."""
    return CheckResult(check, "ok", detail)


def warning(check: str, detail: str, advice: str) -> CheckResult:
    """Return the result of a check that found a possible problem."""
    return CheckResult(check, "warning", detail, advice)


def failed(check: str, detail: str, advice: str = "") -> CheckResult:
    """Return the result of a check that found a problem which stops a job."""
    return CheckResult(check, "failed", detail, advice)


def merge_results(
    results: Mapping[int, Sequence[CheckResult]], hosts: Sequence[str], must_match: Collection[str]
) -> list[CheckResult]:
    """Return one list with the results of all ranks, without duplicates.

    A result that only some ranks have lists their numbers and hosts. results: rank -> its results.
    hosts: of each rank of the job. must_match: checks that fail if the ranks have different results.
    """
    ranks_of: dict[CheckResult, list[int]] = {}
    for rank, results_of_rank in sorted(results.items()):
        for result in dict.fromkeys(results_of_rank):
            ranks_of.setdefault(result, []).append(rank)
    rows = []
    for result, ranks in ranks_of.items():
        details = {
            other.detail for other in ranks_of if other.check == result.check and other.verdict == "ok"
        }
        differs = result.verdict == "ok" and len(details) > 1
        row = result
        if len(ranks) < len(results) and (differs or result.verdict != "ok"):
            row = replace(row, detail=f"{ranks_text(ranks, hosts)}: {result.detail}")
        if differs and result.check in must_match:
            row = replace(
                row,
                verdict="failed",
                advice="use one image or environment, and one kind of GPU, for all ranks of a job",
            )
        rows.append(row)
    return rows


def ranks_text(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return ranks as ranges, with up to three of their hosts: 'ranks 0-7 (node1)'."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    numbers = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    names = [name for name, _ in Counter(hosts[rank] for rank in ranks).most_common()]
    shown = ", ".join(names[:3] + (["..."] if len(names) > 3 else []))
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {numbers} ({shown})"
