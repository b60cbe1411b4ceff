"""Turn results into tables and plots, and fill the README in this folder. Trains nothing."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from claims import CLAIMS, Results, values
from pace import format_ratios

from minitron_mp import InputError
from minitron_mp.artifacts.files import write_text
from minitron_mp.report.document import Table, markdown_table

HERE = Path(__file__).parent
SIZES = ("cpu", "h100")
"""Sizes whose results are in the README."""
NOT_RUN = "not run yet"
SHOWN = {True: "shown", False: "not shown", None: "undecided"}
COLUMNS = (
    "variant",
    "parameters",
    "pruned: loss",
    "distilled: loss",
    "KL",
    "last words",
    "tokens",
    "tokens/s",
    "plain loop: loss - ours",
    "our speed / its",
)


def read(folder: Path) -> tuple[Results, dict[str, Any] | None]:
    """Return (variant -> its results, the measured inference speed)."""
    results: Results = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != "speed.json":
            result = json.loads(path.read_text())
            results.setdefault(result["variant"], []).append(result)
    speed = folder / "speed.json"
    return results, json.loads(speed.read_text()) if speed.exists() else None


def of_claim(name: str, results: Results) -> Results | None:
    """Return the results of a claim's variants at their common seeds, in one order.

    Returns None without a common seed. Raises InputError if the results do not compare.
    """
    by_seed = {variant: {r["seed"]: r for r in results.get(variant, [])} for variant in CLAIMS[name].variants}
    seeds = sorted(set.intersection(*(set(runs) for runs in by_seed.values())))
    if not seeds:
        return None
    origins = {
        json.dumps([runs[seed]["base"], runs[seed]["inputs"]]) for runs in by_seed.values() for seed in seeds
    }
    if len(origins) > 1:
        raise InputError(
            f"the results of {name} come from different settings, models or text; "
            "rerun them with the same ones, or delete the others"
        )
    return {variant: [runs[seed] for seed in seeds] for variant, runs in by_seed.items()}


def comparable(name: str, results: Results) -> tuple[Results | None, str]:
    """Return of_claim(), or None and the reason, so that one claim does not block the report."""
    try:
        return of_claim(name, results), NOT_RUN
    except InputError as error:
        return None, str(error)


def judged(name: str, results: Results, speed: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return (verdict and finding, tokens and seeds, command, text, hardware and date).

    If the results do not compare, return the reason and two empty texts.
    """
    by_variant, reason = comparable(name, results)
    if by_variant is None:
        return reason, "", ""
    judge = CLAIMS[name].judge
    finding, shown = judge(by_variant, speed) if name == "width" else judge(by_variant)
    runs = [run for variant_runs in by_variant.values() for run in variant_runs]
    seeds = len(next(iter(by_variant.values())))
    tokens = " or ".join(f"{count:,}" for count in sorted({run["tokens"] for run in runs}))
    effort = f"{tokens} tokens a variant, {seeds} {'seeds' if seeds > 1 else 'seed'}"
    options = f"--size {runs[0]['size']}"
    if runs[0]["overrides"]:
        options += f" --set {' '.join(runs[0]['overrides'])}"
    facts = (", ".join(sorted({run[key] for run in runs})) for key in ("text", "hardware", "date"))
    provenance = "; ".join([f"`{options}`", *facts])
    verdict = SHOWN[shown] + (" (one seed)" if seeds == 1 else "")
    return f"**{verdict}**: {finding}", effort, provenance


def rows(results: Results) -> list[tuple[str, ...]]:
    """Return one row per variant; with several seeds, mean and spread (largest minus smallest)."""
    table = []
    for variant, runs in results.items():

        def cell(*path: str, digits: int = 4, variant: str = variant) -> str:
            numbers = values(results, variant, *path)
            spread = f" ({max(numbers) - min(numbers):.{digits}f})" if len(numbers) > 1 else ""
            return f"{statistics.mean(numbers):.{digits}f}{spread}"

        plain = [run for run in runs if run["plain"]]
        worse = ", ".join(f"{run['plain']['loss'] - run['distilled']['loss']:+.4f}" for run in plain)
        faster = ", ".join(format_ratios(run["plain"]["ratios"]) for run in plain if "ratios" in run["plain"])
        words = cell("tasks", "last words", "distilled", "accuracy", digits=3) if runs[0].get("tasks") else ""
        sizes = " or ".join(f"{size:,}" for size in sorted({run["parameters"]["student"] for run in runs}))
        cells = [sizes, cell("pruned", "loss"), cell("distilled", "loss"), cell("distilled", "kl"), words]
        table.append(
            (
                variant,
                *cells,
                f"{runs[0]['tokens']:,}",
                f"{statistics.mean(values(results, variant, 'tokens_per_s')):,.0f}",
                worse,
                faster,
            )
        )
    return table


def summary(by_size: dict[str, Path]) -> str:
    """Return the table of all claims. by_size: heading -> folder of results."""
    read_all = {heading: read(folder) for heading, folder in by_size.items()}
    table = []
    for name, claim in CLAIMS.items():
        cells = []
        for results, speed in read_all.values():
            verdict, effort, _ = judged(name, results, speed)
            cells.append(f"{verdict} ({effort})" if effort else verdict)
        table.append((f"`{name}`: {claim.title}", claim.paper, *cells))
    parts = [markdown_table(Table(("claim", "paper says", *by_size), table, "left"))]
    return "\n\n".join(
        parts + [beside(heading, results) for heading, (results, _) in read_all.items() if results]
    )


def beside(heading: str, results: Results) -> str:
    """Return a sentence on all plain loops."""
    runs = [run for variant_runs in results.values() for run in variant_runs if run["plain"]]
    if not runs:
        return f"{heading}: no plain loop has run yet."
    worse = sorted(run["plain"]["loss"] - run["distilled"]["loss"] for run in runs)
    text = f"{heading}: {len(runs)} plain transformers loops; their held-out loss minus ours: "
    text += f"{worse[0]:+.4f} to {worse[-1]:+.4f}, median {statistics.median(worse):+.4f}; "
    text += "our speed over theirs, "
    timed = [run["plain"]["ratios"] for run in runs if "ratios" in run["plain"]]
    if not timed:
        return text + "in alternating steps: not measured yet."
    middles, pairs = sorted(map(statistics.median, timed)), [ratio for ratios in timed for ratio in ratios]
    text += f"in alternating steps: medians of {len(timed)} runs {middles[0]:.2f} to {middles[-1]:.2f}; "
    return text + f"ours was slower in {sum(ratio < 1 for ratio in pairs)} of {len(pairs)} pairs."


def details(folder: Path, plots: str) -> str:
    """Return a section for each claim with results. plots: prefix of the plot files' names."""
    (results, speed), parts = read(folder), []
    for name, claim in CLAIMS.items():
        by_variant = comparable(name, results)[0]
        if by_variant:
            verdict, effort, provenance = judged(name, results, speed)
            table = markdown_table(Table(COLUMNS, rows(by_variant)))
            parts += [
                f"### {name}: {claim.title}",
                f"{verdict} ({effort}; {provenance}). Paper: {claim.paper}.",
                table,
            ]
            if name == "width" and speed:
                models = [
                    (model, *(f"{by_kind[kind]:,.1f}" for kind in speed["kinds"]))
                    for model, by_kind in speed["tokens_per_s"].items()
                ]
                parts += [
                    f"Inference in tokens/s ({speed['hardware']}, {speed['date']}):",
                    markdown_table(Table(("model", *speed["kinds"]), models)),
                ]
            parts.append(f"![{claim.title}]({plots}{name}.png)")
    return "\n\n".join(parts)


NOTE = """Losses are in nats per token on held-out text. "last words" is the accuracy of the distilled
student. With several seeds a cell has the mean and, in brackets, the largest value minus the smallest.
The plain loop has one value per seed. Speed ratios have the median of the alternating pairs of steps,
with the smallest and the largest."""


def write(folder: Path, output: Path) -> None:
    """Write report.md and a plot for each claim to output, from the results in folder."""
    plots(folder, output)
    write_text(
        output / "report.md",
        "\n\n".join(["# Claims", summary({"here": folder}), NOTE, details(folder, "")]) + "\n",
    )
    print(f"report: {output / 'report.md'}")


def plots(folder: Path, output: Path) -> None:
    results, _ = read(folder)
    for name, claim in CLAIMS.items():
        by_variant = comparable(name, results)[0]
        if by_variant:
            plot(by_variant, claim.title, output / f"{name}.png")


def plot(results: Results, title: str, path: Path) -> None:
    """Plot KL on the training text over tokens, and the held-out losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, (variant, runs) in enumerate(results.items()):
        for run in runs:
            tokens, _, kl, _ = zip(*run["curve"])
            left.plot(tokens, kl, color=f"C{number}", alpha=0.8, label=variant if run is runs[0] else None)
        for when, marker in (("pruned", "o"), ("distilled", "s")):
            losses = values(results, variant, when, "loss")
            right.plot(
                losses,
                [number] * len(losses),
                marker,
                color=f"C{number}",
                fillstyle="none" if when == "pruned" else "full",
            )
    left.set(xlabel="tokens", ylabel="KL(teacher || student) of the batch, nats a token")
    left.legend(fontsize=8)
    right.set(
        yticks=range(len(results)),
        yticklabels=list(results),
        xlabel="held-out loss, nats a token: open pruned, filled distilled",
    )
    right.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def publish(folder: Path, size: str) -> None:
    """Copy results to this folder, and fill the README from all published results."""
    published = HERE / "results" / size
    published.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copy(path, published / path.name)
    plots(published, published)
    write_text(HERE / "README.md", filled((HERE / "README.md").read_text(), HERE / "results"))


def filled(readme: str, results: Path) -> str:
    """Return the README with new tables. results: a folder with a folder per size."""
    parts = [
        summary({f"here, {size}": results / size for size in SIZES}),
        NOTE,
        *(details(results / size, f"results/{size}/") for size in SIZES),
    ]
    made = "\n\n".join(part for part in parts if part)
    return re.sub(
        r"(<!-- results -->\n).*(<!-- end of results -->)",
        lambda m: f"{m[1]}{made}\n{m[2]}",
        readme,
        flags=re.S,
    )
