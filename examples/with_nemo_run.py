"""Run a stage of minitron-mp on a Slurm cluster with NeMo-Run.

python examples/with_nemo_run.py examples/quickstart.yaml compress --nodes 4 --partition batch --account me

--form partial sends a Python function with its recipe (run.Partial). --form script sends a command
line (run.Script). See docs/cluster.md for the installation of NeMo-Run. With --form partial the
nodes need NeMo-Run, too.
"""

import argparse
import os
from pathlib import Path


def task(form: str, stage: str, recipe: str, overrides: list[str]):
    """Return the task of every rank.

    The recipe is sent as a call of load_recipe. run.Config(Recipe, model=..., distill=...) works,
    too.
    """
    import nemo_run as run

    from minitron_mp import compress, load_recipe, run_stage

    if form == "script":
        return run.Script(path="minitron_mp", m=True, args=[stage, recipe, *overrides], entrypoint="python")
    config = run.Config(load_recipe, path=recipe, overrides=overrides)
    if stage == "compress":
        return run.Partial(compress, recipe=config)
    return run.Partial(run_stage, name=stage, recipe=config)


def executor(options: argparse.Namespace):
    import nemo_run as run

    return run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        nodes=options.nodes,
        ntasks_per_node=options.ranks,  # NeMo-Run starts one task, torchrun's agent, for them
        gpus_per_node=options.gpus,
        time=options.time,
        launcher="torchrun",
        packager=run.Packager(),  # copies nothing, because the nodes have access to this checkout
        srun_args=[f"--chdir={Path.cwd()}"],  # relative paths of the recipe start here
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
