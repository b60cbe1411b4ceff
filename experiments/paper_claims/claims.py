"""The claims. Each one compares the results of its variants seed by seed and returns a verdict.

run.py writes a result. It has loss, kl and tasks of teacher, pruned and distilled model on the
held-out text, number of parameters and tokens, speed, and the training curve.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from variants import AGGREGATIONS, LONGER, SEARCHED, scored

Results = dict[str, list[dict[str, Any]]]
"""Variant -> its results, one per seed, in the same order for all variants of a claim."""
Verdict = tuple[str, bool | None]
"""(finding, whether it agrees with the paper). None: seeds disagree, or the noise is as large."""


def means(results: Results, variant: str, *path: str) -> float:
    return statistics.mean(values(results, variant, *path))


def values(results: Results, variant: str, *path: str) -> list[float]:
    numbers = []
    for result in results[variant]:
        for key in path:
            result = result[key]
        numbers.append(float(result))
    return numbers


def agree(signs: Sequence[bool]) -> bool | None:
    """Return the common value of all seeds, or None if they differ."""
    return signs[0] if len(set(signs)) == 1 else None


def least(results: Results, variant: str, *path: str) -> bool | None:
    """Return whether the variant has the smallest value at every seed, None if seeds differ."""
    rows = {name: values(results, name, *path) for name in results}
    return agree(
        [
            all(rows[variant][i] < row[i] for name, row in rows.items() if name != variant)
            for i in range(len(rows[variant]))
        ]
    )


def listed(results: Results, *path: str, digits: int = 3) -> str:
    return ", ".join(f"{name} {means(results, name, *path):.{digits}f}" for name in results)


def fewer_tokens(results: Results) -> Verdict:
    long = f"random weights, {LONGER} x tokens"
    text = f"held-out loss: {listed(results, 'distilled', 'loss')}; "
    factors = [
        tokens_factor(fast["curve"], slow["curve"]) for fast, slow in zip(results["pruned"], results[long])
    ]
    factor = min(factor for factor, _ in factors)
    if not factor:
        text += f"pruned never reaches the last KL of {long}"
    elif any(at_start for _, at_start in factors):
        text += f"at least {factor:.0f} x fewer tokens to the same KL, "
        text += f"which pruned weights have from the first {WINDOW} steps on"
    else:
        text += f"{factor:.0f} x fewer tokens to the same KL"
    better = [
        p < r
        for p, r in zip(
            values(results, "pruned", "distilled", "loss"),
            values(results, "random weights", "distilled", "loss"),
        )
    ]
    return text, agree(better) if factor else False


WINDOW = 8
"""Steps over which a training curve is averaged."""


def tokens_factor(
    fast: list[list[float]], slow: list[list[float]], window: int = WINDOW
) -> tuple[float, bool]:
    """Return (factor, whether the fast run has the slow run's last KL in its first window).

    The factor is the tokens of the slow run over the tokens after which the fast run reaches that
    KL, and 0 if it never does. Curves have [tokens, loss, kl, ce] per step. KL is averaged over a
    window.
    """
    smooth = {}
    for name, curve in (("fast", fast), ("slow", slow)):
        size = min(window, len(curve))
        kl = np.convolve([row[2] for row in curve], np.ones(size) / size, "valid")
        smooth[name] = list(zip([row[0] for row in curve[size - 1 :]], kl))
    tokens, goal = smooth["slow"][-1]
    reached = [t for t, kl in smooth["fast"] if kl <= goal]
    return (tokens / reached[0], reached[0] == smooth["fast"][0][0]) if reached else (0.0, False)


def objective(results: Results) -> Verdict:
    named = {"KL" if name == "pruned" else name: runs for name, runs in results.items()}
    return "held-out loss: " + listed(named, "distilled", "loss", digits=4), least(
        results, "pruned", "distilled", "loss"
    )


def width_or_depth(results: Results, speed: dict[str, Any] | None = None) -> Verdict:
    """Compare width with the better of two depth cuts at each seed, and their speeds.

    Speed is measured for the contiguous cut; the other one has as many layers.
    """
    rows = {
        "width": "pruned",
        "depth, contiguous": "contiguous layers",
        "depth, scattered": "scattered layers",
    }
    sizes = {name: results[variant][0]["parameters"]["student"] for name, variant in rows.items()}
    text = "; ".join(
        f"{name} {sizes[name] / 1e6:.1f}M: held-out loss {means(results, variant, 'distilled', 'loss'):.3f}"
        for name, variant in rows.items()
    )
    better = least(results, "pruned", "distilled", "loss")
    if not speed:
        return text + "; speed not measured yet", None
    ratios = {
        name: {
            kind: speed["tokens_per_s"][name][kind] / speed["tokens_per_s"]["teacher"][kind]
            for kind in speed["kinds"]
        }
        for name in ("width", "depth")
    }
    text += ". Speed over the teacher's, width and depth: " + ", ".join(
        f"{k} {ratios['width'][k]:.2f}x, {ratios['depth'][k]:.2f}x" for k in speed["kinds"]
    )
    return text, better and all(ratios["depth"][k] > ratios["width"][k] for k in speed["kinds"])


def corrected(results: Results) -> Verdict:
    runs = results["shifted text, corrected teacher"]
    before = statistics.mean(run["uncorrected"]["loss"] for run in runs)
    after = statistics.mean(run["teacher"]["loss"] for run in runs)
    text = f"teacher's held-out loss {before:.3f} -> {after:.3f} ({after / before - 1:+.1%}); "
    text += f"student's {listed(results, 'distilled', 'loss')}, "
    text += "cut from a teacher that was trained on as many tokens of this text"
    return text, least(results, "shifted text, corrected teacher", "distilled", "loss")


def aggregation(results: Results) -> Verdict:
    measured = dict(results)
    labels = (
        {"pruned": "(l2, mean)"}
        | {scored(b, s): f"({b}, {s})" for b, s in AGGREGATIONS[1:]}
        | {"random scores": "random"}
    )
    parts = []
    for when in ("pruned", "distilled"):
        ranked = sorted(measured, key=lambda name: means(results, name, when, "loss"))
        rows = ", ".join(f"{labels[name]} {means(results, name, when, 'loss'):.3f}" for name in ranked)
        parts.append(f"{when}: {rows}")
    best = [
        [
            min(measured, key=lambda name: values(results, name, when, "loss")[i]) == "pruned"
            for i in range(len(results["pruned"]))
        ]
        for when in ("pruned", "distilled")
    ]
    verdict = agree([all(pair) for pair in zip(*best)])
    return "held-out loss, best first, " + "; ".join(parts), verdict


def against_chance(results: Results) -> Verdict:
    text = "; ".join(f"{when}: {listed(results, when, 'loss')}" for when in ("pruned", "distilled"))
    pairs = [
        zip(*(values(results, name, when, "loss") for name in ("pruned", "random scores")))
        for when in ("pruned", "distilled")
    ]
    return f"held-out loss, {text}", agree(
        [all(ours < chance for ours, chance in seed) for seed in zip(*pairs)]
    )


def contiguous(results: Results) -> Verdict:
    def accuracy(name: str, when: str) -> str:
        return f"{means(results, name, 'tasks', 'last words', when, 'accuracy'):.1%}"

    parts = []
    for name in results:
        before, after = (means(results, name, when, "loss") for when in ("pruned", "distilled"))
        words = f"last words {accuracy(name, 'pruned')} and {accuracy(name, 'distilled')}"
        parts.append(f"{name}: loss {before:.3f} pruned, {after:.3f} distilled, {words}")
    accuracies = [values(results, name, "tasks", "last words", "distilled", "accuracy") for name in results]
    errors = [
        values(results, name, "tasks", "last words", "distilled", "accuracy_stderr") for name in results
    ]
    difference = statistics.mean(accuracies[0]) - statistics.mean(accuracies[1])
    # More seeds do not lower the error, because they have the same items.
    error = math.sqrt(sum(statistics.mean(e) ** 2 for e in errors))
    text = f"{'; '.join(parts)}; difference of the last words {difference:+.1%} +- {error:.1%}"
    return text, None if abs(difference) <= 2 * error else difference > 0


def search_wins(results: Results) -> Verdict:
    sizes = ", ".join(f"{name} {results[name][0]['parameters']['student'] / 1e6:.1f}M" for name in results)
    text = f"held-out loss: {listed(results, 'distilled', 'loss')} ({sizes}, at the first seed)"
    best, largest = results["search: best"], results["search: largest"]
    if any(
        one["config"] == other["config"] and one["layers"] == other["layers"]
        for one, other in zip(best, largest)
    ):
        return text + "; at a seed the largest was the best", None
    return text, least(results, "search: best", "distilled", "loss")


@dataclass(frozen=True)
class Claim:
    title: str
    paper: str
    variants: tuple[str, ...]
    judge: Callable[..., Verdict]
    needs: str = ""
    """Option without which the claim is skipped."""


CLAIMS: dict[str, Claim] = {
    "initialisation": Claim(
        "Pruned weights beat random ones at equal tokens",
        "8B, 1.8B tokens: LM loss 2.049 pruned, 3.953 random (2407.14679, table 1); "
        "380B tokens instead of 15T, 40 x fewer (2408.11796)",
        ("pruned", "random weights", f"random weights, {LONGER} x tokens"),
        fewer_tokens,
    ),
    "objective": Claim(
        "KL alone beats cross-entropy alone and both",
        "LM loss: KL 2.107, CE + KL 2.117 (2407.14679, table 15); "
        "pruned and distilled below pruned and trained on LM loss (2408.11796, figure 6)",
        ("pruned", "CE", "CE + KL"),
        objective,
    ),
    "width": Claim(
        "Width beats depth in quality, depth beats width in speed",
        "LM loss 2.049 width (7.7B), 2.155 depth (9.4B) (2407.14679, table 13); "
        "speed-up 1.8 x width, 2.7 x depth at 4B (2408.11796)",
        ("pruned", "contiguous layers", "scattered layers"),
        width_or_depth,
    ),
    "correction": Claim(
        "A corrected teacher makes a better student",
        "over 6 % lower LM loss by fine-tuning the teacher on the distillation data (2408.11796)",
        ("shifted text", "shifted text, corrected teacher"),
        corrected,
        "--shift-text",
    ),
    "scores": Claim(
        "(l2, mean) is the best aggregation of scores",
        "LM loss after pruning: (l2, mean) 7.18, (mean, mean) 7.21, others 7.94 to 10.55 "
        "(2407.14679, table 11)",
        (*(scored(b, s) for b, s in AGGREGATIONS), "random scores"),
        aggregation,
    ),
    "chance": Claim(
        "Importance chooses better than chance",
        "random pruning far behind pruning by importance, both with distillation (2408.11796, figure 6)",
        ("pruned", "random scores"),
        against_chance,
    ),
    "layers": Claim(
        "Contiguous layers are better cut than scattered ones",
        "Winogrande 0.595 contiguous, 0.5 (chance) scattered, although the latter have the better LM loss "
        "(2408.11796)",
        ("contiguous layers", "scattered layers"),
        contiguous,
    ),
    "search": Claim(
        "A searched size beats the largest one that fits",
        "no numbers on these two; the best candidate within 5 % of the parameters is chosen after about "
        "300 steps of training, before which the order changes (2407.14679, figure 9)",
        tuple(f"search: {which}" for which in SEARCHED),
        search_wins,
    ),
}
