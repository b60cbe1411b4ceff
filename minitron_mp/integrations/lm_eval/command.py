"""The command `harness`: run tasks of lm-evaluation-harness on a model of a recipe."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mp import __version__
from minitron_mp.artifacts.checkpoint import load_weights
from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import Manifest, require_artifact
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import say, speaks, table
from minitron_mp.data.tokenizer import load_hugging_face
from minitron_mp.distributed.sync import on_rank_0
from minitron_mp.distributed.world import World, join_world
from minitron_mp.errors import InputError, refuse
from minitron_mp.integrations.lm_eval.sharded_lm import ShardedLM
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.report.tables import HARNESS_HEADER, harness_rows
from minitron_mp.training.teacher_correction import PREFIX
from minitron_mp.workflow.graph import StageGraph
from minitron_mp.workflow.saved_steps import at_saved_step
from minitron_mp.workflow.stage_files import tokenizer_path

SAVED_RESULTS = (
    "results",
    "groups",
    "group_subtasks",
    "n-samples",
    "n-shot",
    "versions",
    "higher_is_better",
    "configs",
    "lm_eval_version",
    "transformers_version",
)
"""Keys of the harness's results that are written to the file."""

BOOTSTRAP_ITERATIONS = 100_000
"""Number of resamplings for standard errors, the default of the harness.

Only rank 0 computes them, in separate processes.
"""


@dataclass(frozen=True)
class HarnessOptions:
    """Options of the command `harness`."""

    tasks: Sequence[str]
    """Names of tasks, names of groups, or patterns."""
    model: str = "distilled"
    """Name of a model, as in evaluation.json."""
    limit: int | None = None
    """Number of items of each task; None for all."""
    num_fewshot: int | None = None
    include_path: Path | None = None
    """Folder with more tasks. If it has all requested tasks, the harness's task files are not read."""
    max_length: int | None = None
    """Longest input of the model in tokens; default: data.sequence_length."""
    chat_template: bool = False
    step: str = ""
    """Saved step of distill, or "best"; "" for the final student."""


@dataclass(frozen=True)
class StoredModel:
    """A model on disk."""

    checkpoint: Path
    arch: Arch
    made_from: dict[str, str]
    """Stage -> fingerprint of its artifact."""
    prefix: str
    """Prefix of the keys in the checkpoint."""


def run_harness(recipe: Recipe, options: HarnessOptions) -> Path:
    """Run tasks on a model of a recipe, and write harness_<model>_<hash of the settings>.json.

    Returns the path of that file. Called by all ranks of the job.
    """
    # Imported here, because it imports the package `datasets`, which takes seconds.
    from lm_eval.evaluator import simple_evaluate

    project = StageGraph(recipe)
    if options.step:
        project = at_saved_step(project, options.step)
    with join_world(recipe.parallel, seed=recipe.seed) as world, _quiet_on_other_ranks():
        stored = on_rank_0(lambda: _find_model(project, options.model))
        length = _checked_length(options.max_length or recipe.data.sequence_length, stored.arch)
        folder = tokenizer_path(recipe, project.paths)
        tokenizer = load_hugging_face(folder, stored.arch.vocab_size)
        if options.chat_template and not tokenizer.chat_template:
            raise InputError("--apply-chat-template: the tokenizer has no chat template; remove the option")
        manager, names = _find_tasks(options.tasks, options.include_path)
        # Rank 0 downloads the data, and all other ranks read it from the cache.
        on_rank_0(lambda: _load_tasks(manager, names), takes_long=True)
        model = _load_model(recipe, stored, world, length, is_teacher=options.model == "teacher")
        lm = ShardedLM(model, tokenizer, max_length=length, micro_batch_size=recipe.evaluate.micro_batch_size)
        results = simple_evaluate(
            lm,
            tasks=names,
            task_manager=manager,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            apply_chat_template=options.chat_template,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_ITERATIONS if world.is_main else 0,
        )
        manifest = Manifest(
            stage="harness",
            settings={
                "model": options.model,
                "tasks": names,
                "limit": options.limit,
                "num_fewshot": options.num_fewshot,
                "max_length": length,
                "chat_template": options.chat_template,
                **({"step": project.manifest("evaluate").settings["step"]} if options.step else {}),
            },
            inputs=stored.made_from,
            arch=stored.arch,
            made_by=f"minitron_mp {__version__}",
        )
        output = recipe.root / f"harness_{options.model}_{manifest.fingerprint[:8]}.json"
        on_rank_0(lambda: _write_results(output, manifest, results, lm.num_truncated))
    return output


@contextlib.contextmanager
def _quiet_on_other_ranks() -> Iterator[None]:
    """Discard the output of the harness on all ranks but rank 0."""
    with contextlib.ExitStack() as stack:
        if not speaks():
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
            stack.enter_context(contextlib.redirect_stderr(sink))
        yield


def _find_model(project: StageGraph, name: str) -> StoredModel:
    """Return the checkpoint of a model; InputError if it is missing or made from another recipe."""
    recipe = project.recipe
    # A teacher that is corrected during distillation is saved beside the student.
    in_distillation = name == "teacher" and recipe.corrects_during_distillation
    stages = {
        "teacher": "distill" if in_distillation else recipe.distillation_teacher,
        **recipe.evaluated_models,
    }
    if name not in stages:
        raise InputError(f"--model {name}: this recipe has no such model; give one of {', '.join(stages)}")
    require_artifact(project.paths["import"], "import", project.manifest("import"))  # the tokenizer
    stage = stages[name]
    manifest = require_artifact(project.paths[stage], stage, project.manifest(stage))
    arch = manifest.arch
    if in_distillation:
        arch = require_artifact(project.paths[recipe.distillation_teacher], recipe.distillation_teacher).arch
    assert arch is not None
    prefix = PREFIX if in_distillation else ""
    return StoredModel(project.paths[stage], arch, {stage: manifest.fingerprint}, prefix)


def _checked_length(length: int, arch: Arch) -> int:
    if length > arch.max_position_embeddings:
        raise InputError(
            f"--max-length {length} is above the model's max_position_embeddings "
            f"{arch.max_position_embeddings}; give at most that"
        )
    return length


def _find_tasks(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """Return (task manager of the harness, names of all matching tasks)."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path: there is no folder {include_path}; give a folder with task files")
    folder = str(include_path) if include_path else None
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=folder)  # reads some ten thousand files
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    refuse("the harness has no task of this name; give names that `lm-eval ls tasks` lists:", unknown)
    return manager, manager.match_tasks(list(tasks))


def _load_tasks(manager: Any, names: list[str]) -> None:
    try:
        manager.load(names)
    except Exception as error:  # whatever a task's file, its data set or the network raises
        raise InputError(
            f"the tasks {', '.join(names)} cannot be loaded ({type(error).__name__}: {error}); correct "
            "their files, or download their data sets where the network is available"
        ) from error


def _load_model(
    recipe: Recipe, stored: StoredModel, world: World, length: int, *, is_teacher: bool
) -> ShardedModel:
    precision = recipe.teacher_precision if is_teacher else recipe.precision
    model = build_model(
        stored.arch,
        world,
        ModelOptions(
            precision=precision,
            sequence_length=length,
            transformer_impl=recipe.transformer_impl,
        ),
    )
    load_weights(model.chunks, stored.checkpoint, world, stored.prefix)
    return model


def _write_results(path: Path, manifest: Manifest, results: dict[str, Any], num_truncated: int) -> None:
    """Write the results and print them as a table; for one process."""
    from lm_eval.utils import handle_non_serializable

    content = {
        "manifest": manifest.model_dump(mode="json"),
        "cut_requests": num_truncated,
        **{name: results[name] for name in SAVED_RESULTS if name in results},
    }
    write_text(path, json.dumps(content, indent=1, default=handle_non_serializable))
    title = f"{manifest.settings['model']}: lm-evaluation-harness {results['lm_eval_version']}"
    table(title, HARNESS_HEADER, harness_rows(results))
    if num_truncated:
        say(
            f"the beginning of {num_truncated} requests was cut off, because they were longer than "
            f"{manifest.settings['max_length']} tokens; --max-length raises the limit"
        )
    say(f"harness: {path}; `minitron-mp report` includes it in a finished report")
