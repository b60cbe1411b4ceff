"""The command line: one command for each stage, and `compress` for all stages.

The parser imports neither torch nor megatron.
"""

from __future__ import annotations

import errno
import io
import locale
import logging
import os
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from minitron_mp.cli_options import Accept, DryRun, Overrides, RecipeFile, Round, Step, World
from minitron_mp.cli_stages import add_stage_command, print_dry_run, refuse_world
from minitron_mp.config.recipe import load_recipe
from minitron_mp.console import launched, rank_name, say, speaks, standard_output
from minitron_mp.distributed.job import begin_start, record_refusal
from minitron_mp.errors import OPEN_FILES_ADVICE, InputError, os_error_text
from minitron_mp.workflow.changes import accepted_names
from minitron_mp.workflow.stages import STAGES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress large language models by the Minitron method.",
)


for _stage in STAGES:
    add_stage_command(app, _stage)


@app.command()
def compress(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    world: World = None,
    accept: Accept = "",
) -> None:
    """Run all stages in order.

    Finished stages are skipped, so the same command resumes after a stop.
    """
    resolved = load_recipe(recipe, overrides or [])
    names = accepted_names(accept, resolved)
    if dry_run:
        print_dry_run(resolved, world, None, names)
        return
    refuse_world(world)
    from minitron_mp.workflow.run import compress as run

    run(resolved, names)


@app.command()
def rewind(
    recipe: RecipeFile,
    stage: Annotated[str, typer.Argument(help="distill or correct", show_default=False)],
    step: Annotated[int, typer.Argument(min=0, help="step of the checkpoint", show_default=False)],
    overrides: Overrides = None,
    round: Round = "",
) -> None:
    """Move the checkpoints after a step aside, so that the next run of the stage resumes from it.

    Those of the siblings of a remote teacher are moved as well. It needs no GPU. Use it before a job
    that resubmits itself.
    """
    from minitron_mp.distributed.job import sigterm_exits
    from minitron_mp.workflow.changes import rewind as go_back
    from minitron_mp.workflow.graph import StageGraph
    from minitron_mp.workflow.join import co_student_recipes
    from minitron_mp.workflow.output_folder import locked_output

    students = co_student_recipes(load_recipe(recipe, overrides or []).of_round(round)).values()
    with sigterm_exits(), ExitStack() as locks:
        graphs = []
        for student in students:
            graph = StageGraph(student)
            graph.require_stage(stage)
            graph, _ = graph.place(stage)
            locks.enter_context(locked_output(graph.recipe.run.root))
            graphs.append(graph)
        go_back(graphs, stage, step)


@app.command()
def harness(
    recipe: RecipeFile,
    overrides: Overrides = None,
    tasks: Annotated[
        str, typer.Option(help="names of tasks of lm-evaluation-harness, separated by commas")
    ] = "",
    model: Annotated[
        str,
        typer.Option(help="teacher, pruned or distilled; uncorrected or unpruned if the recipe has them"),
    ] = "distilled",
    limit: Annotated[
        int | None, typer.Option(min=1, help="number of items of each task; default: all")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="examples before each item; default: the task's number")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="folder with further task files")] = None,
    step: Step = "",
    round: Round = "",
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="longest input of the model in tokens; default: data.sequence_length"),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="format items with the tokenizer's chat template")
    ] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model of the recipe (needs the extra eval)."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("harness needs --tasks, for example --tasks arc_easy,lambada_openai")
    resolved = load_recipe(recipe, overrides or []).of_round(round)
    from minitron_mp.integrations.lm_eval.command import HarnessOptions, run_harness

    options = HarnessOptions(
        names,
        model=model,
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
        max_length=max_length,
        chat_template=apply_chat_template,
        step=step,
    )
    run_harness(resolved, options)


@app.command()
def report(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write report.md and report.html again from the artifacts."""
    resolved = load_recipe(recipe, overrides or [])
    from minitron_mp.artifacts.manifest import require_artifact
    from minitron_mp.distributed.job import sigterm_exits
    from minitron_mp.report.report import write_report
    from minitron_mp.workflow.graph import StageGraph
    from minitron_mp.workflow.output_folder import locked_output

    *_, graph = StageGraph(resolved).rounds()
    graph.check_output(report=True)
    for name in ("evaluate", "export"):
        graph.require_inputs(name)
        require_artifact(graph.paths[name], graph.command(name), graph.manifest(name))
    with sigterm_exits(), locked_output(resolved.root):
        write_report(graph)


@app.command()
def environment(
    recipe: RecipeFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="ranks on each node")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="nodes of the job")] = 1,
) -> None:
    """Print the environment variables of the ranks with reasons, as shell lines (launch/env.sh)."""
    from minitron_mp.cluster.environment import environment_lines, this_node

    lines = environment_lines(load_recipe(recipe, overrides or []), this_node(ranks), nodes)
    with standard_output():
        print(*lines, sep="\n", flush=True)


@app.command()
def estimate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option("--world", min=1, help="number of GPUs")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200 or a100")] = "h100",
    hardware: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with other hardware values (docs/planning.md)")
    ] = None,
    times: Annotated[
        Path | None,
        typer.Option(help="layer times from benchmarks/layers.py; default: the file in this package"),
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="price of a GPU-hour")] = None,
    top: Annotated[int, typer.Option(min=1, help="number of layouts to show")] = 10,
    json: Annotated[Path | None, typer.Option(help="write all results to this JSON file")] = None,
    round: Round = "",
    plot: Annotated[Path | None, typer.Option(help="plot 8 to 2,048 GPUs: .png, .svg or .pdf")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="do not correct towards published rates")] = False,
) -> None:
    """Estimate memory, step time and GPU-hours, and find the best layouts on a number of GPUs."""
    from minitron_mp.planning.command import EstimateOptions, run_estimate

    options = EstimateOptions(
        world,
        gpu=gpu,
        hardware_file=hardware,
        times_file=times,
        price=price,
        top=top,
        json_file=json,
        plot_file=plot,
        raw=raw,
    )
    run_estimate(load_recipe(recipe, overrides or []).of_round(round), options)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe; its model, tokenizer and folders are also checked")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, GPUs, FP8, links between ranks, clocks, folders and disk space.

    The exit code is 1 if a check fails, otherwise 0.
    """
    from minitron_mp.cluster.doctor import doctor as examine

    raise typer.Exit(examine(recipe, overrides or []))


@app.command()
def reference(
    output: Annotated[Path | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Print the reference of all recipe keys in Markdown."""
    from minitron_mp.config.reference import recipe_reference

    text = recipe_reference()
    if output is None:
        with standard_output():
            print(text, end="", flush=True)
    else:
        output.write_text(text, encoding="utf-8")
        say(f"reference: {output}")


def _require_utf8() -> None:
    """Start this command again in Python's UTF-8 mode if the locale has another encoding.

    torch and other libraries read their own files in the encoding of the locale, and fail.
    """
    encoding = locale.getpreferredencoding(False).lower().replace("-", "").replace("_", "")
    if encoding != "utf8" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _require_working_folder() -> None:
    """Raise InputError if the working folder has been deleted. torch would end this process."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError(
            "the working folder has been deleted or replaced; change to a folder that exists: cd PATH, or "
            'cd "$PWD" if the folder was made again'
        ) from error


def main() -> None:
    """Run the command line.

    An InputError or an OSError is printed without a traceback, and the exit code is 2.
    """
    _require_utf8()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names and texts may have any characters
            stream.reconfigure(errors="backslashreplace")
    # Megatron-Core warns on each rank about every optional package that is missing.
    warnings.filterwarnings("ignore")
    # This logger prints the traceback of errors that are reported below on one line.
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    # Megatron-Core 0.19 warns at each model that GPTModel will be removed.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        _require_working_folder()
        begin_start()
        app()
    except SystemExit as error:  # of typer, for example for an unknown option
        record_refusal(error)
        raise
    except (InputError, OSError) as error:
        record_refusal(error)
        _exit_with(os_error_text(error) if isinstance(error, OSError) else str(error))
    except (RuntimeError, ImportError) as error:
        if os.strerror(errno.EMFILE) in str(error):  # gloo and the loader of libraries
            _exit_with(f"too many open files; {OPEN_FILES_ADVICE}")
        if not (launched() and _is_lost_connection(error)):
            raise
        reason = str(error).splitlines()[0]
        _exit_with(
            f"another rank has ended or cannot be reached ({reason}); see the output of the rank that ended "
            "first. The same command resumes",
            code=1,
        )


def _exit_with(text: str, code: int = 2) -> NoReturn:
    """Print an error and exit."""
    if not speaks():
        # torchrun stops all ranks when the first one exits, so rank 0 must print first. After this
        # pause only an error that rank 0 does not have is left.
        time.sleep(3)
        text = f"{rank_name()}: {text}"
    errors = Console(stderr=True, highlight=False)
    errors.print("[bold red]error:[/] ", end="")
    errors.print(text, markup=False, soft_wrap=True)
    sys.exit(code)


def _is_lost_connection(error: Exception) -> bool:
    """Return whether gloo, NCCL or the store of the job has lost a rank."""
    is_of_torch = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return is_of_torch or "by peer" in str(error) or "Broken pipe" in str(error)
