"""Run the claims of the two Minitron papers in small, and say what came out. README.md beside this file has what and why.

python experiments/paper_claims/run.py all --size cpu
python experiments/paper_claims/run.py objective layers --size cpu --seeds 1234
python experiments/paper_claims/run.py all --size h100 --text train.txt valid.txt --shift-text novels_train novels_valid
python experiments/paper_claims/run.py all --size cpu --dry-run
python experiments/paper_claims/run.py --size cpu --report

Every variant and seed leaves one result, out/reproduce/SIZE/results/VARIANT-SEED.json. What has its result is skipped, what was stopped
goes on from its last stage or checkpoint. One process; finished variants leave no models behind (--keep leaves them).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # when imported, not run

import report
from baseline import train_plain
from claims import CLAIMS
from pace import WARM_UP, in_turn
from speed import measure
from texts import HELD_OUT, last_words, stdlib_by_package
from variants import BY_HAND, VARIANTS, Variant, searching

from minitron_mp import InputError, Recipe, load_recipe, make_recipe, run_stage
from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import find_manifest, require_artifact
from minitron_mp.models.build import DTYPES
from minitron_mp.pruning.plan import PrunePlan
from minitron_mp.workflow.graph import StageGraph

HERE = Path(__file__).parent
SHARED = ("import", "data", "correct", "score", "depth", "search")
"""Stages whose artefacts all variants that ask for the same use together."""
SIZES = ("cpu", "h100", "toy")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", help=f"all, or some of {', '.join(CLAIMS)}")
    parser.add_argument("--size", choices=SIZES, required=True, help="the recipe SIZE.yaml beside this file")
    parser.add_argument("--model", help="Hugging Face folder of the teacher; default: the recipe's")
    parser.add_argument("--output", type=Path, help="default: the recipe's")
    parser.add_argument(
        "--text",
        nargs=2,
        type=Path,
        metavar=("TRAIN", "VALID"),
        help=".txt or .jsonl files or folders; default: Python's standard library",
    )
    parser.add_argument(
        "--shift-text",
        nargs=2,
        type=Path,
        metavar=("TRAIN", "VALID"),
        help="text far from the teacher's training, for `correction`",
    )
    parser.add_argument(
        "--search",
        type=Path,
        help="search.json of a search that has run, for `search`; default: one of its own a seed",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 1235])
    parser.add_argument(
        "--no-plain",
        action="store_true",
        help="without the plain transformers loops, for a seed after the first",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the size's recipe"
    )
    parser.add_argument("--keep", action="store_true", help="keep the models of finished variants")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how long they take")
    parser.add_argument(
        "--tokens-per-s",
        type=float,
        default=150,
        help="of distillation, for --dry-run; 150: 2 CPU cores with bf16",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write report.md and plots from the results that are there; runs nothing",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="the same, and copy the results beside this file and fill the table of README.md",
    )
    args = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    try:
        return act(args)
    except (InputError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def act(args: argparse.Namespace) -> int:
    base = load_recipe(HERE / f"{args.size}.yaml", args.set)
    output = args.output or base.root
    if args.report or args.publish:
        if not any((output / "results").glob("*.json")):
            raise InputError(f"{output / 'results'} holds no results; give the --output of a run")
        if args.publish and args.size not in report.SIZES:
            raise InputError(
                f"--publish --size {args.size}: the README has results of {' and '.join(report.SIZES)}"
            )
        report.write(output / "results", output)
        if args.publish:
            report.publish(output / "results", args.size)
        return 0
    if args.tokens_per_s <= 0:
        raise InputError(f"--tokens-per-s {args.tokens_per_s:g}: give more than 0")
    chosen = list(CLAIMS) if args.claims == ["all"] else args.claims
    if not chosen or not CLAIMS.keys() >= set(chosen):
        raise InputError(
            f"claims to run: {' '.join(chosen) or 'none'}; give all, or some of {', '.join(CLAIMS)}"
        )
    given = {"--shift-text": args.shift_text}
    for name in [name for name in chosen if CLAIMS[name].needs and not given[CLAIMS[name].needs]]:
        print(f"{name}: left out, it needs {CLAIMS[name].needs}")
        chosen.remove(name)
    variants = list(dict.fromkeys(variant for name in chosen for variant in CLAIMS[name].variants))
    if args.dry_run:
        return plan(args, output, variants)
    refuse_to_overwrite(args, [result_of(output, name, seed) for name in variants for seed in args.seeds])
    failed = 0
    for seed in args.seeds:  # outermost: half the time gives every claim a seed
        for variant in variants:
            try:
                once(args, output, variant, seed)
            except (InputError, OSError, UnicodeError) as error:
                print(f"error: {variant}, seed {seed}: {error}", file=sys.stderr)
                failed += 1
    if "width" in chosen and not failed:
        inference(args, output)
    report.write(output / "results", output)
    return 2 if failed else 0


def recipe_of(args: argparse.Namespace, output: Path, name: str, seed: int) -> Recipe:
    """The size's recipe with this text, as the variant changes it."""
    variant = VARIANTS[name]
    base = load_recipe(HERE / f"{args.size}.yaml", [*args.set, f"seed={seed}"])
    train, valid = text_of(args, output, variant)
    tasks = {}
    if variant.words:
        task = output / "text" / f"last_words_{variant.text}_{base.evaluate.task_items}.jsonl"
        tasks["last words"] = str(last_words(valid, task, base.evaluate.task_items or 100))
    values = base.model_dump()
    changes = {
        "model": args.model or base.model,
        "output": str(output / "runs" / slug(name, seed)),
        "data": {**values["data"], "calibration": [str(train)], "train": [str(train)], "valid": [str(valid)]},
        "evaluate.tasks": tasks,
        **(
            {} if "depth.method" in variant.changes else {"depth": {}}
        ),  # what it says of samples is for methods that measure
        **variant.changes,
    }
    recipe = make_recipe(changed(values, changes), name)
    for derive in variant.derived:
        recipe = make_recipe(changed(recipe.model_dump(), derive(recipe)), name)
    return recipe


def search_of(args: argparse.Namespace, output: Path, recipe: Recipe, seed: int) -> Path:
    """search.json inside the budget of the recipe's target: the given one, or that of a search, which runs unless it is done."""
    if args.search:
        return args.search
    values = {**searching(recipe, args.size), "output": str(output / "searches" / str(seed))}
    # The others score on text that they are trained on, too; what ranks students must be text that none of them has seen.
    values["data"] = {
        **recipe.data.model_dump(),
        "source": recipe.data.train,
        "valid_fraction": HELD_OUT,
        "calibration": [],
        "train": [],
        "valid": [],
    }
    project = StageGraph(make_recipe(changed(recipe.model_dump(), values), "search"))
    project.check()
    project.recipe.root.mkdir(parents=True, exist_ok=True)
    for stage in [*project.before("search"), "search"]:
        run_shared(project, stage, output / "shared")
    return project.paths["search"]


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """values with dotted keys replaced."""
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[last] = value
    return values


def text_of(args: argparse.Namespace, output: Path, variant: Variant) -> tuple[Path, Path]:
    pair = args.shift_text if variant.text == "shift-text" else args.text
    train, valid = pair or stdlib_by_package(output / "text")
    if missing := [str(path) for path in (train, valid) if not path.exists()]:
        raise InputError(
            f"--{variant.text}: there is no {' and no '.join(missing)}; give .txt or .jsonl files or folders of them"
        )
    if train.resolve() == valid.resolve():
        raise InputError(
            f"--{variant.text}: {train} is given for training and as held-out text; give two, of different authors"
        )
    return train, valid


def once(args: argparse.Namespace, output: Path, name: str, seed: int) -> None:
    """The result of one variant and seed, unless it is there."""
    recipe, variant = recipe_of(args, output, name, seed), VARIANTS[name]
    if variant.search:
        recipe = make_recipe(
            changed(recipe.model_dump(), variant.search(recipe, search_of(args, output, recipe, seed))), name
        )
    project = StageGraph(recipe)
    project.check()
    path, mark = result_of(output, name, seed), project.manifest("evaluate").fingerprint
    if made_by(path, mark, base_mark(args), plain=variant.plain and not args.no_plain):
        print(f"{name}, seed {seed}: done, {path}", flush=True)
        return
    print(f"{name}, seed {seed}: {recipe.root}", flush=True)
    start = time.monotonic()
    recipe.root.mkdir(parents=True, exist_ok=True)
    for stage in project.stages:
        run_shared(project, stage, output / "shared")
        rewrite = variant.after.get(stage)
        if rewrite and require_artifact(project.paths[stage], stage).made_by != BY_HAND:
            rewrite(project)
    result, plain = outcome(project), None
    if variant.plain and not args.no_plain:
        plain = train_plain(project, recipe.root / "plain") | in_turn(
            recipe, result["config"], project.paths["import"], pairs=pairs_of(args)
        )
    inputs = {
        "model": project.manifest("import").inputs["model"],
        "text": project.manifest("data").inputs["text"],
    }
    facts = {
        "variant": name,
        "seed": seed,
        "fingerprint": mark,
        "base": base_mark(args),
        "inputs": inputs,
        "wall_s": time.monotonic() - start,
    }
    write_text(
        path,
        json.dumps({**facts, **environment(args, variant), **result, "plain": rounded(plain)}, indent=1)
        + "\n",
    )
    if not args.keep:
        shutil.rmtree(recipe.root)


def pairs_of(args: argparse.Namespace) -> int:
    """Of steps, ours and the plain loop's, to compare their speed by."""
    return 3 if args.size == "toy" else 8


def result_of(output: Path, name: str, seed: int) -> Path:
    return output / "results" / f"{slug(name, seed)}.json"


def made_by(path: Path, mark: str, base: str, *, plain: bool) -> bool:
    """Whether the result is there, and of these settings and this text; plain: with the plain loop's, and their speed."""
    found = json.loads(path.read_text()) if path.exists() else {"fingerprint": None}
    return (
        found["fingerprint"] == mark
        and found["base"] == base
        and not (plain and "ratios" not in (found["plain"] or {}))
    )


def refuse_to_overwrite(args: argparse.Namespace, paths: list[Path]) -> None:
    """InputError where one of these results comes from other settings: the claims that share it would lose it."""
    others = [
        path for path in paths if path.exists() and json.loads(path.read_text())["base"] != base_mark(args)
    ]
    if others:
        more = f" and {len(others) - 1} more" * (len(others) > 1)
        raise InputError(
            f"{others[0]}{more} come from other settings (--set, or another {args.size}.yaml); give another --output, or delete them"
        )


def run_shared(project: StageGraph, stage: str, shared: Path) -> None:
    """run_stage(); for the early stages through a folder of artefacts that variants share by symbolic links."""
    path = project.paths[stage]
    common = shared / f"{project.manifest(stage).fingerprint}-{path.name}"
    if stage in SHARED and common.exists() and not path.exists():
        path.symlink_to(common.resolve())
    run_stage(stage, project.recipe)
    if find_manifest(path) is None:  # SIGTERM, or a stop file
        raise SystemExit(f"{stage} has left early; the same command goes on from there")
    if (
        stage in SHARED
        and not path.is_symlink()
        and not common.exists()
        and require_artifact(path, stage).made_by != BY_HAND
    ):
        shared.mkdir(exist_ok=True)
        path.rename(common)
        path.symlink_to(common.resolve())


def outcome(project: StageGraph) -> dict[str, Any]:
    """What the artefacts of a finished run say."""
    recipe, plan = project.recipe, PrunePlan.load(project.paths["plan"])
    evaluation = json.loads(project.paths["evaluate"].read_text())
    for name in ("manifest", "speed", "texts"):
        evaluation.pop(name)
    steps = [
        json.loads(line) for line in (project.paths["distill"] / "metrics.jsonl").read_text().splitlines()
    ]
    curve, tokens = [], 0
    for step in steps:
        tokens += step["num_tokens"]
        curve.append([tokens, step["loss"], step["kl"], step["ce"]])
    return {
        **evaluation,
        "parameters": {"teacher": plan.teacher.num_parameters(), "student": plan.student.num_parameters()},
        "layers": plan.layers,
        "tokens": tokens,
        "sequence_length": recipe.data.sequence_length,
        "seconds": sum(step["step_time_s"] for step in steps),
        "tokens_per_s": statistics.median(step["tokens_per_s"] for step in steps),
        "curve": rounded(curve),
        "config": json.loads((project.paths["export"] / "config.json").read_text()),
    }


def inference(args: argparse.Namespace, output: Path) -> None:
    """results/speed.json: the teacher against the wide and the deep student of the claim `width`, by measured inference."""
    recipe = recipe_of(args, output, "pruned", args.seeds[0])
    configs = {"teacher": json.loads((Path(recipe.model) / "config.json").read_text())}
    for name, variant in (("width", "pruned"), ("depth", "contiguous layers")):
        configs[name] = json.loads(result_of(output, variant, args.seeds[0]).read_text())["config"]
    path = output / "results" / "speed.json"
    mark = hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:16]
    if path.exists() and json.loads(path.read_text())["fingerprint"] == mark:
        return
    length, toy = recipe.data.sequence_length, args.size == "toy"
    found = measure(
        configs,
        dtype=DTYPES[recipe.precision],
        length=length,
        batch=2 if toy else 8 if args.size == "cpu" else 32,
        new_tokens=4 if toy else 32,
    )
    facts = {
        "fingerprint": mark,
        "kinds": list(found["teacher"]),
        "tokens_per_s": found,
        **environment(args, VARIANTS["pruned"]),
    }
    write_text(path, json.dumps(facts, indent=1) + "\n")


def plan(args: argparse.Namespace, output: Path, variants: list[str]) -> int:
    """Print what there is to do and for how long, counting tokens forward and backward only."""
    total = 0.0
    for name in variants:
        for seed in args.seeds:
            recipe, path = recipe_of(args, output, name, seed), result_of(output, name, seed)
            project = StageGraph(recipe)
            project.check()
            # The sizes of a searched variant are known when its search is done; a result of it is taken for its own.
            plain = VARIANTS[name].plain and not args.no_plain
            done = (
                path.exists()
                if VARIANTS[name].search
                else made_by(path, project.manifest("evaluate").fingerprint, base_mark(args), plain=plain)
            )
            steps = [
                (recipe.distill, recipe.distill.steps * (1 + plain) + 2 * plain * (pairs_of(args) + WARM_UP))
            ]
            steps += [(recipe.correct, recipe.correct.steps)] if recipe.correct else []
            tokens = sum(
                count * training.global_batch_size * recipe.data.sequence_length for training, count in steps
            )
            seconds = 0.0 if done else tokens / args.tokens_per_s
            total += seconds
            print(
                f"{name:40s} seed {seed}  {'done' if done else f'{tokens:12,} tokens {seconds / 60:7.1f} min'}"
            )
    print(
        f"training alone: {total / 3600:.1f} hours at {args.tokens_per_s:g} tokens/s; scores, layer losses and evaluation come on top"
    )
    return 0


def environment(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """When, on what and from what a number came; names of files without their folders."""
    pair = args.shift_text if variant.text == "shift-text" else args.text
    text = (
        f"{pair[0].name}, held out {pair[1].name}"
        if pair
        else f"standard library of Python {platform.python_version()}, held out by package"
    )
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    software = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "size": args.size,
        "overrides": args.set,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "software": software,
        "text": text,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def base_mark(args: argparse.Namespace) -> str:
    """Of the settings that all variants start from; results of different ones are not compared.

    Without defaults: a setting that a later version adds makes no other experiment of this one. Whoever changes a default that cpu.yaml does
    not name makes one, and has to say it there.
    """
    values = load_recipe(HERE / f"{args.size}.yaml", args.set).model_dump(
        mode="json", exclude={"model", "output", "seed"}, exclude_defaults=True
    )
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def slug(name: str, seed: int) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in f"{name} {seed}").split())


def rounded(value: Any) -> Any:
    """Floats to 6 digits, in curves of some hundred rows."""
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
