"""The command line: one command a stage, and compress for all. Parsing imports neither torch nor megatron."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from minitron_mp.config.recipe import Recipe, load_recipe
from minitron_mp.console import say, speaks, table
from minitron_mp.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress large language models by the Minitron method.",
)

RecipeFile = Annotated[
    Path, typer.Argument(help="YAML recipe, for example examples/quickstart.yaml", show_default=False)
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="dotted overrides: distill.steps=50 parallel.tp=2", show_default=False),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="print the resolved recipe, layout, parameters per rank and memory; run nothing"
    ),
]

World = Annotated[
    int | None,
    typer.Option("--world", min=1, help="ranks to plan for in a dry run; default: one copy of the model"),
]

Force = Annotated[bool, typer.Option("--force", help="run the stage although its artefact is up to date")]

HELP = {
    "import": "Hugging Face folder -> sharded checkpoint.",
    "import-teacher": "The model of teacher.model -> sharded checkpoint.",
    "data": "Text -> tokens: calibration, training and held-out parts.",
    "texts": "Further held-out texts -> tokens; for data.held_out.",
    "correct": "Train the teacher on the distillation text by cross-entropy; for recipes with a section correct.",
    "score": "Importance of every layer, neuron, head and channel, by forward passes.",
    "depth": "Losses, or accuracies, without single layers or blocks of them; for depth.method: drop, block, greedy.",
    "search": "Candidates inside a budget, ranked by held-out loss, the best ones distilled for a short time; for recipes with a section search.",
    "plan": "Importance and target -> what to keep. Needs no GPU and no torchrun.",
    "prune": "Teacher and plan -> student checkpoint.",
    "cache": "The teacher's signals of all microbatches -> disk; for teacher.placement: cached.",
    "distill": "Train the student on the teacher's distribution.",
    "evaluate": "Held-out loss, perplexity and KL of teacher, pruned and distilled student.",
    "export": "Student -> Hugging Face folder.",
}


def _add(name: str) -> None:
    @app.command(name, help=HELP[name])
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        world: World = None,
        force: Force = False,
    ) -> None:
        resolved = load_recipe(recipe, overrides or [])
        if _dry(resolved, dry_run, world, name):
            return
        from minitron_mp.workflow.run import run_stage

        run_stage(name, resolved, force=force)


for _name in HELP:
    _add(_name)


@app.command()
def compress(
    recipe: RecipeFile, overrides: Overrides = None, dry_run: DryRun = False, world: World = None
) -> None:
    """All stages in order; what is done is skipped, so the same command goes on after a stop."""
    resolved = load_recipe(recipe, overrides or [])
    if _dry(resolved, dry_run, world):
        return
    from minitron_mp.workflow.run import compress as run

    run(resolved)


@app.command()
def harness(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tasks: Annotated[
        str, typer.Option(help="names of tasks of lm-evaluation-harness, with commas between")
    ] = "",
    model: Annotated[
        str, typer.Option(help="teacher, pruned, distilled; uncorrected, unpruned where there is one")
    ] = "distilled",
    limit: Annotated[int | None, typer.Option(min=1, help="the first so many items of each task")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="examples before each item; default: the task's own")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="folder with task files of your own")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="tokens that the model is given at most; default: data.sequence_length"),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="items as chats, by the tokenizer's template")
    ] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model of the recipe; needs the extra eval (lm-eval)."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("harness needs --tasks, for example --tasks arc_easy,lambada_openai")
    resolved = load_recipe(recipe, overrides or [])
    from minitron_mp.integrations.lm_eval import run_harness

    where = {"include_path": include_path, "max_length": max_length, "chat_template": apply_chat_template}
    run_harness(resolved, names, model=model, limit=limit, num_fewshot=num_fewshot, **where)


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write report.md and report.html again from the artefacts."""
    resolved = load_recipe(recipe, overrides or [])
    from minitron_mp.artifacts.manifest import require_artifact
    from minitron_mp.report.report import write_report
    from minitron_mp.workflow.graph import StageGraph

    project = StageGraph(resolved)
    for name in ("evaluate", "export"):
        project.require_inputs(name)
        require_artifact(project.paths[name], name, project.manifest(name))
    write_report(project)


@app.command()
def environment(
    recipe: RecipeFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="ranks on each node")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the job")] = 1,
) -> None:
    """What the environment of the ranks should hold, with reasons, for a shell to evaluate; launch/env.sh does."""
    from minitron_mp.cluster.environment import lines, this_node

    print(*lines(load_recipe(recipe, overrides or []), this_node(ranks), nodes), sep="\n")


@app.command()
def estimate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option("--world", min=1, help="GPUs")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100")] = "h100",
    hardware: Annotated[
        Path | None, typer.Option(help="YAML or JSON with values of your own (docs/estimate.md)")
    ] = None,
    times: Annotated[
        Path | None, typer.Option(help="layer times that benchmarks/layers.py wrote; default: those shipped")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="of a GPU-hour")] = None,
    top: Annotated[int, typer.Option(min=1, help="layouts to show")] = 10,
    json: Annotated[Path | None, typer.Option(help="write all of it to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw 8 to 2,048 GPUs: .png, .svg or .pdf")] = None,
) -> None:
    """Memory, step time, GPU-hours and the best layouts on so many GPUs, before anything runs."""
    from minitron_mp.planning.command import run_estimate

    files = {"hardware_file": hardware, "times_file": times, "json_file": json, "plot_file": plot}
    run_estimate(load_recipe(recipe, overrides or []), world, gpu=gpu, price=price, top=top, **files)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe whose model, tokenizer and folders are checked, too")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, GPUs, FP8, links between ranks, clocks, folders and room: a table, exit code 0 or 1."""
    from minitron_mp.cluster.doctor import doctor as examine

    raise typer.Exit(examine(recipe, overrides or []))


def _dry(recipe: Recipe, dry_run: bool, world: int | None, stage: str | None = None) -> bool:
    """Whether this was a dry run, then done. stage: that the command runs; None for all."""
    if dry_run:
        _dry_run(recipe, world, stage)
    elif world is not None:
        raise InputError(
            "--world is for --dry-run; a run has the ranks that torchrun starts (--nproc-per-node)"
        )
    return dry_run


def _dry_run(recipe: Recipe, world: int | None, stage: str | None) -> None:
    """Everything that is known before anything runs; InputError when the recipe cannot run."""
    from omegaconf import OmegaConf

    from minitron_mp.models.hf_config import has_weights, read_arch
    from minitron_mp.planning.command import dry_run_rows
    from minitron_mp.planning.memory import memory_rows
    from minitron_mp.pruning.candidates import candidate_name
    from minitron_mp.pruning.search_space import survey_candidates
    from minitron_mp.pruning.target import resolve_target
    from minitron_mp.workflow.graph import StageGraph

    project = StageGraph(recipe)
    if stage:
        project.require_stage(stage)
    t = recipe.teacher
    ranks = world or (t.student_ranks or recipe.parallel.model_ranks) + t.ranks_in(None) + sum(
        t.siblings.values()
    )
    models = [Path(recipe.model), Path(t.model or recipe.model)]
    weights = all(map(has_weights, filter(Path.is_dir, models)))
    project.check(ranks, weights=weights)
    base, teacher = (read_arch(folder, weights=weights) for folder in models)
    found, left_out = (
        survey_candidates(recipe, base)
        if recipe.search
        else ([resolve_target(base, recipe.target, recipe.parallel.tp, recipe.export.family)], "")
    )
    student = max(found, key=lambda arch: arch.num_parameters())
    say(OmegaConf.to_yaml(OmegaConf.create(recipe.model_dump())))
    table(
        "layout and memory",
        ("what", "value"),
        memory_rows(base, teacher, student, recipe, ranks) + dry_run_rows(teacher, student, recipe, ranks),
    )
    if recipe.search:
        table(
            "candidates of the search; the layout above is that of the largest",
            ("candidate", "parameters"),
            [(candidate_name(a), f"{a.num_parameters():,}") for a in found],
        )
        if left_out:
            say(left_out)
    if not weights:
        say("only config.json is there, no weights: the sizes are known, the artefacts are not")
        return
    states = {None: "done", True: "to do", False: "again"}
    rows = []
    for name in project.stages:
        why = project.why_not_done(name)
        rows.append(
            (name, str(project.paths[name]), states[None if why is None else not why], "; ".join(why or []))
        )
    table("stages", ("stage", "artefact", "state", "differs"), rows)


def main() -> Any:
    """Console entry: an InputError, or a disk that fails, is printed without a traceback, exit code 2."""
    warnings.filterwarnings(
        "ignore"
    )  # Megatron-Core warns of every optional package that is not there, on each rank
    logging.getLogger("torch.distributed.checkpoint").setLevel(
        logging.CRITICAL
    )  # tells the traceback of what we say in a line
    logging.getLogger("megatron").setLevel(logging.ERROR)  # and 0.19 at each model that GPTModel will go
    try:
        app()
    except (InputError, OSError) as error:
        if speaks():
            errors = Console(stderr=True, highlight=False)
            errors.print("[bold red]error:[/] ", end="")
            errors.print(str(error), markup=False, soft_wrap=True)
        else:
            time.sleep(3)  # the first rank that ends makes torchrun stop the others, and rank 0 has to print
        sys.exit(2)
