"""Results -> a table "paper says / here", a table and a plot for each claim, and the README beside this file. Computes nothing anew."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

from claims import CLAIMS, Results, values
from pace import told

from minitron_mp import InputError
from minitron_mp.artifacts.files import write_text
from minitron_mp.report.document import Table, markdown_table

HERE = Path(__file__).parent
SIZES = ("cpu", "h100")
"""Of which results are published."""
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
    """(variant -> results by seed, the measured inference speed)."""
    results: Results = {}
    for path in sorted(folder.glob("*.json")):
        if path.name != "speed.json":
            found = json.loads(path.read_text())
            results.setdefault(found["variant"], []).append(found)
    speed = folder / "speed.json"
    return results, json.loads(speed.read_text()) if speed.exists() else None


def of_claim(name: str, results: Results) -> Results | None:
    """Results of a claim's variants at the seeds that all of them have, in one order; None where there is none, InputError where they do not compare."""
    by_seed = {variant: {r["seed"]: r for r in results.get(variant, [])} for variant in CLAIMS[name].variants}
    seeds = sorted(set.intersection(*(set(own) for own in by_seed.values())))
    if not seeds:
        return None
    if (
        len(
            {
                json.dumps([own[seed]["base"], own[seed]["inputs"]])
                for own in by_seed.values()
                for seed in seeds
            }
        )
        > 1
    ):
        raise InputError(
            f"the results of {name} come from different settings, models or text; run them again with the same, or delete what does not belong"
        )
    return {variant: [own[seed] for seed in seeds] for variant, own in by_seed.items()}


def comparable(name: str, results: Results) -> tuple[Results | None, str]:
    """of_claim(), or None and why: one claim's results must not keep those of the others from being told."""
    try:
        return of_claim(name, results), NOT_RUN
    except InputError as error:
        return None, str(error)


def judged(name: str, results: Results, speed: dict[str, Any] | None) -> tuple[str, str, str]:
    """Whether the claim is shown and what was seen, how much was trained, where and when; or why nothing can be said, and nothing more."""
    mine, why = comparable(name, results)
    if mine is None:
        return why, "", ""
    said, shown = CLAIMS[name].judge(mine, speed) if name == "width" else CLAIMS[name].judge(mine)
    runs = [run for own in mine.values() for run in own]
    tokens, seeds = sorted({run["tokens"] for run in runs}), len(next(iter(mine.values())))
    effort = (
        f"{' or '.join(f'{count:,}' for count in tokens)} tokens a variant, {seeds} seed{'s' * (seeds > 1)}"
    )
    options = (
        f"`--size {runs[0]['size']}"
        + f" --set {' '.join(runs[0]['overrides'])}" * bool(runs[0]["overrides"])
        + "`"
    )
    place = "; ".join(
        [options, *(", ".join(sorted({run[key] for run in runs})) for key in ("text", "hardware", "date"))]
    )
    return f"**{SHOWN[shown]}{' (one seed)' * (seeds == 1)}**: {said}", effort, place


def rows(results: Results) -> list[tuple[str, ...]]:
    """One a variant; where there are several seeds, mean and spread (largest less smallest)."""
    found = []
    for variant, own in results.items():

        def cell(*path: str, digits: int = 4, variant: str = variant) -> str:
            numbers = values(results, variant, *path)
            spread = f" ({max(numbers) - min(numbers):.{digits}f})" if len(numbers) > 1 else ""
            return f"{statistics.mean(numbers):.{digits}f}{spread}"

        plain = [run for run in own if run["plain"]]
        worse = ", ".join(f"{run['plain']['loss'] - run['distilled']['loss']:+.4f}" for run in plain)
        faster = ", ".join(told(run["plain"]["ratios"]) for run in plain if "ratios" in run["plain"])
        words = cell("tasks", "last words", "distilled", "accuracy", digits=3) if own[0].get("tasks") else ""
        sizes = " or ".join(f"{size:,}" for size in sorted({run["parameters"]["student"] for run in own}))
        cells = [sizes, cell("pruned", "loss"), cell("distilled", "loss"), cell("distilled", "kl"), words]
        found.append(
            (
                variant,
                *cells,
                f"{own[0]['tokens']:,}",
                f"{statistics.mean(values(results, variant, 'tokens_per_s')):,.0f}",
                worse,
                faster,
            )
        )
    return found


def summary(by_size: dict[str, Path]) -> str:
    """The table of all claims. by_size: heading -> folder of results."""
    read_all = {heading: read(folder) for heading, folder in by_size.items()}
    table = []
    for name, claim in CLAIMS.items():
        cells = []
        for results, speed in read_all.values():
            said, effort, _ = judged(name, results, speed)
            cells.append(f"{said} ({effort})" if effort else said)
        table.append((f"`{name}`: {claim.title}", claim.paper, *cells))
    parts = [markdown_table(Table(("claim", "paper says", *by_size), table, "left"))]
    return "\n\n".join(
        parts + [beside(heading, results) for heading, (results, _) in read_all.items() if results]
    )


def beside(heading: str, results: Results) -> str:
    """A sentence on all plain loops."""
    runs = [run for own in results.values() for run in own if run["plain"]]
    if not runs:
        return f"{heading}: no plain loop has run yet."
    worse = sorted(run["plain"]["loss"] - run["distilled"]["loss"] for run in runs)
    text = f"{heading}: {len(runs)} plain transformers loops beside; their held-out loss less ours: {worse[0]:+.4f} to {worse[-1]:+.4f}, "
    text += f"median {statistics.median(worse):+.4f}; our speed over theirs, "
    timed = [run["plain"]["ratios"] for run in runs if "ratios" in run["plain"]]
    if not timed:
        return text + "in turn: not measured yet."
    middles, pairs = sorted(map(statistics.median, timed)), [ratio for ratios in timed for ratio in ratios]
    text += f"steps in turn: medians of {len(timed)} runs {middles[0]:.2f} to {middles[-1]:.2f}; "
    return text + f"ours was the slower one in {sum(ratio < 1 for ratio in pairs)} of {len(pairs)} pairs."


def details(folder: Path, plots: str) -> str:
    """A section for each claim that was run. plots: what comes before the name of a plot, where it is shown."""
    (results, speed), parts = read(folder), []
    for name, claim in CLAIMS.items():
        if mine := comparable(name, results)[0]:
            said, effort, place = judged(name, results, speed)
            table = markdown_table(Table(COLUMNS, rows(mine)))
            parts += [
                f"### {name}: {claim.title}",
                f"{said} ({effort}; {place}). Paper: {claim.paper}.",
                table,
            ]
            if name == "width" and speed:
                models = [
                    (model, *(f"{own[kind]:,.1f}" for kind in speed["kinds"]))
                    for model, own in speed["tokens_per_s"].items()
                ]
                parts += [
                    f"Inference in tokens/s ({speed['hardware']}, {speed['date']}):",
                    markdown_table(Table(("model", *speed["kinds"]), models)),
                ]
            parts.append(f"![{claim.title}]({plots}{name}.png)")
    return "\n\n".join(parts)


NOTE = """Losses in nats a token on held-out text; last words: share guessed by the distilled student. Of several seeds: the mean, in brackets the
largest less the smallest; the plain loop seed by seed; speeds: median of the pairs of steps that ran in turn, least and largest."""


def write(folder: Path, output: Path) -> None:
    """report.md and a plot for each claim below output, from the results in folder."""
    plots(folder, output)
    write_text(
        output / "report.md",
        "\n\n".join(["# Claims", summary({"here": folder}), NOTE, details(folder, "")]) + "\n",
    )
    print(f"report: {output / 'report.md'}")


def plots(folder: Path, output: Path) -> None:
    results, _ = read(folder)
    for name, claim in CLAIMS.items():
        if mine := comparable(name, results)[0]:
            plot(mine, claim.title, output / f"{name}.png")


def plot(results: Results, title: str, path: Path) -> None:
    """KL on the training text over tokens, and the held-out loss before and after distillation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for number, (variant, own) in enumerate(results.items()):
        for run in own:
            tokens, _, kl, _ = zip(*run["curve"])
            left.plot(tokens, kl, color=f"C{number}", alpha=0.8, label=variant if run is own[0] else None)
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
    """Copy results beside this file, and fill the README from all that lie there."""
    own = HERE / "results" / size
    own.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        shutil.copy(path, own / path.name)
    plots(own, own)
    write_text(HERE / "README.md", filled((HERE / "README.md").read_text(), HERE / "results"))


def filled(readme: str, results: Path) -> str:
    """The README with its tables made from the results below a folder of sizes."""
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
