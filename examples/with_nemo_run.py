"""A command of minitron-mp on a Slurm cluster through NeMo-Run: as run.Partial, a Python function with its recipe, or as run.Script, a command line.

python examples/with_nemo_run.py examples/quickstart.yaml compress --nodes 4 --partition batch --account me

docs/cluster.md says how NeMo-Run is installed. The nodes need it for --form partial only.
"""

import argparse
import os
from pathlib import Path


def task(form: str, stage: str, recipe: str, overrides: list[str]):
    """What every rank runs. The recipe travels as the call that reads it; run.Config(Recipe, model=..., distill=run.Config(Distill, ...)) does as well."""
    import nemo_run as run

    from minitron_mp import compress, load_recipe, run_stage

    if form == "script":
        return run.Script(path="minitron_mp", m=True, args=[stage, recipe, *overrides], entrypoint="python")
    config = run.Config(load_recipe, path=recipe, overrides=overrides)
    return (
        run.Partial(compress, recipe=config)
        if stage == "compress"
        else run.Partial(run_stage, name=stage, recipe=config)
    )


def executor(options: argparse.Namespace):
    import nemo_run as run

    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        nodes=options.nodes,
        ntasks_per_node=options.ranks,  # NeMo-Run makes one task of them, torchrun's agent
        gpus_per_node=options.gpus,
        time=options.time,
        launcher="torchrun",
        packager=run.Packager(),  # copies nothing: the nodes see this checkout
        srun_args=[f"--chdir={Path.cwd()}"],  # paths in the recipe mean what they mean here
        env_vars={
            name: os.environ[name]
            for name in ("PATH", "PYTHONPATH", "GLOO_SOCKET_IFNAME")
            if name in os.environ
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("stage", help="compress, or one stage")
    parser.add_argument("overrides", nargs="*", help="dotted overrides: distill.steps=50")
    parser.add_argument("--form", choices=["partial", "script"], default="partial")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=8, help="on each node")
    parser.add_argument("--gpus", type=int, help="on each node")
    parser.add_argument("--time", default="04:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account", required=True)
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script")
    options = parser.parse_intermixed_args()
    import nemo_run as run

    with run.Experiment("minitron") as experiment:
        experiment.add(
            task(options.form, options.stage, options.recipe, options.overrides),
            executor=executor(options),
            name=options.stage,
        )
        experiment.dryrun() if options.dry_run else experiment.run(detach=True)


if __name__ == "__main__":
    main()
