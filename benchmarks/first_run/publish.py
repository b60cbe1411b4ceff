"""Write the GPU sections of docs/results.md and README.md from the JSON of a first run.

    python benchmarks/first_run/publish.py out/first_gpu/first_gpu.json    copy it, and write the pages
    python benchmarks/first_run/publish.py                                 write the pages again

The JSON is kept in benchmarks/results. Without it the pages state that nothing has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "first_gpu.json"
BEGIN, END = "<!-- first_gpu -->", "<!-- /first_gpu -->"
WIDTH = 100
Content = dict[str, Any]

README_WITHOUT = """**Nothing has run on a GPU yet**: neither the Triton kernels of the loss nor NCCL, \
Transformer Engine or FP8. Their tests ([tests/gpu](tests/gpu)) and benchmarks are written but have not \
run. `bash benchmarks/first_gpu.sh` runs them in 14 minutes."""
RESULTS_WITHOUT = """**Nothing has run on a GPU.** `bash benchmarks/first_gpu.sh` runs tests and benchmarks \
on one GPU in 14 minutes, and `python benchmarks/first_run/publish.py` writes their numbers here. Quoted GPU \
numbers are in [precision](precision.md#speed) and [planning](planning.md#accuracy). Estimates for the \
published recipes are in [planning](planning.md#estimates-for-the-published-recipes)."""


class NotPublishableError(ValueError):
    """The JSON is not a result of a GPU."""


def read(path: Path) -> Content | None:
    """Return the content of a result, or None if there is none."""
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("kind") != "gpu" or content.get("rehearsal") or not content["hardware"]["gpus"]:
        raise NotPublishableError(f"{path} is not the first_gpu.json of a machine with a GPU")
    return content


def numbers_of(content: Content, stage: str) -> Content:
    """Return the numbers of a stage that succeeded, or {}."""
    found = [each for each in content["stages"] if each["name"] == stage and each["result"] == "ok"]
    return found[0]["numbers"] if found else {}


def device_of(content: Content) -> str:
    return content["hardware"]["gpus"][0]["name"]


def counts(content: Content) -> str:
    good = sum(each["result"] == "ok" for each in content["stages"])
    text = f"{good} of {len(content['stages'])} stages succeeded"
    failed = ", ".join(f"`{name}`" for name in content["failed"])
    return f"{text}; failed: {failed}" if failed else text


def readme_text(content: Content | None) -> str:
    if content is None:
        return indented(README_WITHOUT)
    parts = [f"Run on one {device_of(content)} ({content['date'][:10]}): {counts(content)}."]
    rows = numbers_of(content, "loss").get("rows", {})
    parts += [
        f"The loss takes {row['ms']:.1f} ms, {row['of_floor']:.0%} of the floor of its products."
        for name, row in rows.items()
        if name == "ours, float32 logits"
    ]
    return indented(" ".join([*parts, "[All numbers](docs/results.md)."]))


def indented(text: str) -> str:
    """Return the text as an item of a list."""
    return wrapped(f"* {text}", indent="  ")


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def results_text(content: Content | None) -> str:
    if content is None:
        return wrapped(RESULTS_WITHOUT)
    versions = content["versions"]
    named = ("python", "torch", "triton", "megatron-core", "transformer-engine", "transformers")
    software = ", ".join(f"{name} {versions[name]}" for name in named if versions.get(name))
    gpu = content["hardware"]["gpus"][0]
    facts = {
        "hardware": f"{gpu['name']}, {gpu['memory.total']}, driver {gpu['driver_version']}",
        "software": software,
        "date": content["date"],
        "commit": content["commit"][:12] or "unknown",
        "command": f"`bash benchmarks/first_gpu.sh`, {content['seconds']:.0f} s",
        "stages": counts(content),
    }
    parts = [table(("on a GPU (measured here)", ""), [(key, value) for key, value in facts.items()])]
    parts += [part for part in (loss_table(content), step_table(content), stage_table(content)) if part]
    return "\n\n".join(parts)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---", *["---:" if len(head) > 2 else "---"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loss_table(content: Content) -> str:
    rows = []
    for stage in ("loss", "loss_128256", "loss_256000", "loss_tp8"):
        found = numbers_of(content, stage)
        sizes = found.get("sizes", "").partition("bf16, ")[2]
        for name, row in found.get("rows", {}).items():
            memory = f"{row['beyond_gb']:.2f}" if "beyond_gb" in row else ""
            error = f"{row['error']:.1e}" if "error" in row else ""
            rows.append((sizes, name, f"{row['ms']:.1f}", f"{row['of_floor']:.0%}", memory, error))
    return table(("sizes", "loss", "ms", "of floor", "GB beyond", "error"), rows) if rows else ""


def step_table(content: Content) -> str:
    rows = []
    for stage in ("step", "step_graphs"):
        found = numbers_of(content, stage)
        rows += [
            (
                f"{found['sequence_length']:,} tokens, {row['layers']}, {row['loss']}",
                f"{row['step_ms']:.1f}",
                f"{row['tflops']:.0f}",
                f"{row['of_ceiling']:.0%}",
                f"{row['beyond_gib']:.2f}",
            )
            for row in found.get("rows", [])
        ]
    return table(("step", "ms", "TFLOP/s", "of ceiling", "GiB beyond"), rows) if rows else ""


def stage_table(content: Content) -> str:
    rows = [(f"`{each['name']}`", f"{each['seconds']:.0f}", each["result"]) for each in content["stages"]]
    return table(("stage", "s", "result"), rows)


PAGES: dict[str, Callable[[Content | None], str]] = {
    "README.md": readme_text,
    "docs/results.md": results_text,
}


def filled(page: str, text: str) -> str:
    """Return the page with the text between its two marks."""
    parts = re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", page)
    if len(parts) != 3:
        raise ValueError(f"the page needs {BEGIN} and {END} once each")
    return f"{parts[0]}{BEGIN}\n{text}\n{END}{parts[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, nargs="?", help="first_gpu.json of a run")
    path = parser.parse_args().result
    if path is not None:
        if read(path) is None:
            raise SystemExit(f"there is no {path}")
        KEPT.parent.mkdir(exist_ok=True)
        shutil.copy(path, KEPT)
    content = read(KEPT)
    for name, write in PAGES.items():
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8"), write(content)), encoding="utf-8")
        print(f"{name}: written")


if __name__ == "__main__":
    main()
