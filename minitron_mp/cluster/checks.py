"""What a check found, and how the findings of many ranks become one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's table."""

    check: str
    verdict: Verdict
    found: str
    cure: str = ""


def together(
    told: Mapping[int, Sequence[Finding]], hosts: Sequence[str], alike: Collection[str]
) -> list[Finding]:
    """One list of what all ranks found: what all say is said once, what some say, with their ranks and hosts.

    told: rank -> its findings. hosts: of each rank of the job. alike: checks of which all ranks must have found the same.
    """
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in sorted(told.items()):
        for finding in dict.fromkeys(findings):
            ranks.setdefault(finding, []).append(rank)
    rows = []
    for finding, who in ranks.items():
        kinds = {other.found for other in ranks if other.check == finding.check and other.verdict == "ok"}
        differs = finding.verdict == "ok" and len(kinds) > 1
        if len(who) < len(told) and (differs or finding.verdict != "ok"):
            finding = replace(finding, found=f"{ranks_text(who, hosts)}: {finding.found}")
        if differs and finding.check in alike:
            finding = replace(
                finding,
                verdict="failed",
                cure="the same for all ranks of a job: one image or environment, one kind of GPU",
            )
        rows.append(finding)
    return rows


def ranks_text(ranks: Sequence[int], where: Sequence[str]) -> str:
    """'ranks 0-7 (node1)': runs of ranks, and their hosts where few."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    names = [name for name, _ in Counter(where[rank] for rank in ranks).most_common()]
    return f"rank{'s' * (len(ranks) > 1)} {text} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
