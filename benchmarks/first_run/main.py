"""Run the stages of a first run and write one JSON of results.

    python benchmarks/first_run/main.py gpu [--rehearse] [--only NAME ...] [--minutes 14]
    python benchmarks/first_run/main.py node

The exit code is 0 if every stage that this machine can run succeeded. first_gpu.json (or
first_node.json) is rewritten after each stage, so that a run that is cut off has results, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu_stages import MINUTES, gpu_stages
from machine import ROOT, facts
from node_stages import NODE_MINUTES, node_stages
from stages import FAILED, NO_TIME, OK, TIMED_OUT, Stage, run_stages

KINDS = {"gpu": (gpu_stages, MINUTES), "node": (node_stages, NODE_MINUTES)}
REHEARSAL_MINUTES = 20.0
BAD = (FAILED, TIMED_OUT)


def set_environment(rehearse: bool) -> None:
    """Set what all stages need: paths, loopback NCCL on one node, few threads."""
    folders = [ROOT, ROOT / "tests" / "support", ROOT / "tests" / "ranks", os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders if str(folder))
    usual = {
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NVTE_FRAMEWORK": "pytorch",
        "OMP_NUM_THREADS": "1" if rehearse else "2",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "160",
    }
    for name, value in usual.items():
        os.environ.setdefault(name, value)
    if rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["MINITRON_REQUIRE_GPU"] = "1"  # tests/gpu fails where it would be skipped


TOY_MODEL = {
    "model_type": "llama",
    "vocab_size": 304,
    "max_position_embeddings": 128,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TOY_RECIPE = """\
model: {folder}/model
output: {folder}/out
precision: fp32
data: {{source: {folder}/text, sequence_length: 32}}
target: {{num_layers: 3, hidden_size: 48, ffn_hidden_size: 96}}
distill: {{steps: 4, global_batch_size: 4, micro_batch_size: 2, lr: 1.0e-3, warmup_steps: 1}}
"""


def write_toy_recipe(folder: Path) -> None:
    """Write a recipe whose model is a config.json: the planner needs sizes only."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(TOY_MODEL))
    (folder / "recipe.yaml").write_text(TOY_RECIPE.format(folder=folder))


def write(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file at once."""
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(content, indent=1) + "\n")
    half.replace(path)


def run(kind: str, stages: list[Stage], args: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Run the stages; return and write the content of the JSON file."""
    start, path = time.monotonic(), args.output / f"first_{kind}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    content = {"format": 1, "kind": kind, "rehearsal": args.rehearse, "minutes": args.minutes, **known}

    def save(results: list[dict[str, Any]]) -> None:
        content["seconds"] = round(time.monotonic() - start, 1)
        content["finished"] = len(results) == len(stages)
        content["failed"] = [each["name"] for each in results if each["result"] in BAD]
        content["not_run"] = {
            each["name"]: each["result"] for each in results if each["result"] not in (OK, *BAD)
        }
        content["stages"] = results
        write(path, content)

    save([])
    run_stages(stages, args.output, start + 60 * args.minutes, save)
    return content


def chosen(stages: list[Stage], only: list[str] | None) -> list[Stage]:
    unknown = set(only or []) - {stage.name for stage in stages}
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        sys.exit(f"unknown stages: {', '.join(sorted(unknown))}; known: {known}")
    return [stage for stage in stages if not only or stage.name in only]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--output", type=Path, help="default: out/first_gpu or out/first_node")
    parser.add_argument("--minutes", type=float, help="every stage ends by then; above 0")
    parser.add_argument("--only", nargs="+", metavar="STAGE")
    parser.add_argument("--list", action="store_true", help="list the stages and what each one shows")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU at tiny sizes")
    args = parser.parse_args(words)
    make_stages, minutes = KINDS[args.kind]
    rehearsed = "_rehearsal" if args.rehearse else ""
    args.output = (args.output or Path("out") / f"first_{args.kind}{rehearsed}").absolute()
    if args.minutes is None:
        args.minutes = REHEARSAL_MINUTES if args.rehearse else minutes
    if not args.minutes > 0:
        parser.error(f"--minutes is {args.minutes:g}; give a number above 0")
    set_environment(args.rehearse)
    known = facts()
    stages = chosen(make_stages(known, args.rehearse), args.only)
    if args.list:
        for stage in stages:
            print(f"{stage.name:22} {stage.limit_s:4.0f} s  {stage.missing or stage.shows}")
        return 0
    if args.rehearse:
        write_toy_recipe(args.output / "toy")
    content = run(args.kind, stages, args, known)
    good = sum(each["result"] == OK for each in content["stages"])
    print(
        f"{good} stages ok, {len(content['failed'])} failed, {len(content['not_run'])} not run "
        f"in {content['seconds']:.0f} s: {args.output / f'first_{args.kind}.json'}"
    )
    if content["failed"]:
        print("failed: " + ", ".join(content["failed"]))
    late = [name for name, result in content["not_run"].items() if result == NO_TIME]
    if late:
        print(f"no time left for: {', '.join(late)}; run them with --only {' '.join(late)}")
    return 1 if content["failed"] or not good else 0


if __name__ == "__main__":
    sys.exit(main())
