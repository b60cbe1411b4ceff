"""Test the claims of the two Minitron papers at small scale. See README.md in this folder.

python experiments/paper_claims/run.py all --size cpu
python experiments/paper_claims/run.py objective layers --size cpu --seeds 1234
python experiments/paper_claims/run.py all --size h100 --text train.txt valid.txt
python experiments/paper_claims/run.py all --size cpu --dry-run
python experiments/paper_claims/run.py --size cpu --report

Each variant and seed writes one result, out/paper_claims/SIZE/results/VARIANT-SEED.json. Variants
with a result are skipped. Interrupted ones resume from their last stage or checkpoint. It runs in
one process, and deletes the models of finished variants (--keep keeps them).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # needed if this file is imported

import report
from baseline import train_plain
from claims import CLAIMS
from pace import WARM_UP, in_turn
from recipes import base_mark, changed, recipe_of, run_shared, search_of
from records import environment, made_by, outcome, refuse_to_overwrite, result_of, rounded
from speed import measure
from variants import BY_HAND, VARIANTS

from minitron_mp import InputError, load_recipe, make_recipe
from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.workflow.graph import StageGraph

HERE = Path(__file__).parent
SIZES = ("cpu", "h100", "toy")


def main(words: list[str] | None = None) -> int:
    args = make_parser().parse_args(words)
    warnings.filterwarnings("ignore")
    try:
        return act(args)
    except (InputError, OSError, UnicodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claims", nargs="*", help=f"all, or some of {', '.join(CLAIMS)}")
    parser.add_argument("--size", choices=SIZES, required=True, help="the recipe SIZE.yaml beside this file")
    parser.add_argument("--model", help="Hugging Face folder of the teacher; default: the recipe's")
    parser.add_argument("--output", type=Path, help="default: the recipe's")
    texts = {
        "--text": ".txt or .jsonl files or folders; default: Python's standard library",
        "--shift-text": "text far from the teacher's training, for `correction`",
    }
    for option, text in texts.items():
        parser.add_argument(option, nargs=2, type=Path, metavar=("TRAIN", "VALID"), help=text)
    parser.add_argument(
        "--search",
        type=Path,
        help="search.json of a finished search, for `search`; default: run one per seed",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 1235])
    parser.add_argument(
        "--no-plain",
        action="store_true",
        help="skip the plain transformers loops, for example for the second seed",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the size's recipe"
    )
    parser.add_argument("--keep", action="store_true", help="keep the models of finished variants")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and their time")
    parser.add_argument(
        "--tokens-per-s",
        type=float,
        default=150,
        help="speed of distillation, for --dry-run; 150: 2 CPU cores with bf16",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="write report.md and plots from existing results; runs nothing",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="the same, and copy the results to this folder and update README.md",
    )
    return parser


def act(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    base = load_recipe(HERE / f"{args.size}.yaml", args.set)
    output = args.output or base.root
    if args.report or args.publish:
        write_report(args, output)
        return 0
    if args.tokens_per_s <= 0:
        raise InputError(f"--tokens-per-s {args.tokens_per_s:g}: give more than 0")
    chosen = chosen_claims(args)
    variants = list(dict.fromkeys(variant for name in chosen for variant in CLAIMS[name].variants))
    if args.dry_run:
        return plan(args, output, variants)
    refuse_to_overwrite(args, [result_of(output, name, seed) for name in variants for seed in args.seeds])
    failed = 0
    for seed in args.seeds:  # the outer loop, so that all claims have one seed first
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


def write_report(args: argparse.Namespace, output: Path) -> None:
    """Write the report of existing results; with --publish also the README."""
    if not any((output / "results").glob("*.json")):
        raise InputError(f"{output / 'results'} holds no results; give the --output of a run")
    if args.publish and args.size not in report.SIZES:
        raise InputError(
            f"--publish --size {args.size}: the README has results of {' and '.join(report.SIZES)}"
        )
    report.write(output / "results", output)
    if args.publish:
        report.publish(output / "results", args.size)


def chosen_claims(args: argparse.Namespace) -> list[str]:
    """Return the claims to run, without those whose text is missing."""
    chosen = list(CLAIMS) if args.claims == ["all"] else args.claims
    if not chosen or not CLAIMS.keys() >= set(chosen):
        raise InputError(
            f"claims to run: {' '.join(chosen) or 'none'}; give all, or some of {', '.join(CLAIMS)}"
        )
    given = {"--shift-text": args.shift_text}
    for name in [name for name in chosen if CLAIMS[name].needs and not given[CLAIMS[name].needs]]:
        print(f"{name}: skipped, it needs {CLAIMS[name].needs}")
        chosen.remove(name)
    return chosen


def once(args: argparse.Namespace, output: Path, name: str, seed: int) -> None:
    """Compute and write the result of one variant and seed, unless it exists."""
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
    """Return the number of step pairs, ours and the plain loop's, in the speed comparison."""
    return 3 if args.size == "toy" else 8


def inference(args: argparse.Namespace, output: Path) -> None:
    """Write results/speed.json: inference speed of the teacher and of both students of `width`."""
    recipe = recipe_of(args, output, "pruned", args.seeds[0])
    configs = {"teacher": json.loads((Path(recipe.model) / "config.json").read_text())}
    for name, variant in (("width", "pruned"), ("depth", "contiguous layers")):
        configs[name] = json.loads(result_of(output, variant, args.seeds[0]).read_text())["config"]
    path = output / "results" / "speed.json"
    mark = hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()[:16]
    if path.exists() and json.loads(path.read_text())["fingerprint"] == mark:
        return
    length, toy = recipe.data.sequence_length, args.size == "toy"
    speeds = measure(
        configs,
        dtype=DTYPES[recipe.precision],
        length=length,
        batch=2 if toy else 8 if args.size == "cpu" else 32,
        new_tokens=4 if toy else 32,
    )
    facts = {
        "fingerprint": mark,
        "kinds": list(speeds["teacher"]),
        "tokens_per_s": speeds,
        **environment(args, VARIANTS["pruned"]),
    }
    write_text(path, json.dumps(facts, indent=1) + "\n")


def plan(args: argparse.Namespace, output: Path, variants: list[str]) -> int:
    """Print the runs and their time. The time covers training only."""
    total = 0.0
    for name in variants:
        for seed in args.seeds:
            recipe, path = recipe_of(args, output, name, seed), result_of(output, name, seed)
            project = StageGraph(recipe)
            project.check()
            # The sizes of a searched variant are known only after its search, so any result counts.
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
            cost = "done" if done else f"{tokens:12,} tokens {seconds / 60:7.1f} min"
            print(f"{name:40s} seed {seed}  {cost}")
    print(
        f"training: {total / 3600:.1f} hours at {args.tokens_per_s:g} tokens/s; "
        "scores, layer losses and evaluation take additional time"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
