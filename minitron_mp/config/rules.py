"""Rules between the sections of a recipe.

Each rule is a function: recipe -> problems, one sentence each.

RULES apply to every recipe and are checked when a recipe is read. RUN_RULES are checked before a
run starts, together with the rules that read files (workflow/preflight.py). A recipe that is not
run, such as a plan for a cluster, may break RUN_RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minitron_mp.config.engine_rules import ENGINE_RULES, training_sections
from minitron_mp.config.pruning import TargetConfig

if TYPE_CHECKING:
    from minitron_mp.config.parallel import ParallelConfig
    from minitron_mp.config.recipe import Recipe

Rule = Callable[["Recipe"], list[str]]


def rule_problems(recipe: Recipe) -> list[str]:
    """Return the problems of RULES, in their order."""
    return [problem for rule in RULES for problem in rule(recipe)]


def run_rule_problems(recipe: Recipe) -> list[str]:
    """Return the problems of RUN_RULES, in their order."""
    return [problem for rule in RUN_RULES for problem in rule(recipe)]


# Correction


def correction_trains_the_pruned_model(recipe: Recipe) -> list[str]:
    if recipe.correct and recipe.teacher.model:
        return [
            "correct trains the model that is pruned, and teacher.model is a different model; "
            "correct that model in a separate run, or drop one of the two"
        ]
    return []


def correction_during_distillation(recipe: Recipe) -> list[str]:
    correct, distill = recipe.correct, recipe.distill
    if correct is None or not recipe.corrects_during_distillation:
        return []
    problems = []
    if recipe.teacher.placement != "colocated":
        problems.append(
            "correct.when during trains the teacher on the student's ranks, "
            f"teacher.placement is {recipe.teacher.placement}; set colocated, or correct.when: before"
        )
    if distill.states:
        problems.append("distill.states needs a frozen teacher; use correct.when: before, or drop states")
    if correct.steps > distill.steps:
        problems.append(
            f"correct.steps {correct.steps} is above distill.steps {distill.steps}; "
            "with correct.when during the teacher trains one step per step of the student, so lower it"
        )
    for name in ("global_batch_size", "micro_batch_size"):
        if getattr(correct, name) != getattr(distill, name):
            problems.append(
                f"correct.{name} {getattr(correct, name)} is not distill.{name} {getattr(distill, name)}; "
                "with correct.when during both train on the same batches, so set the same value"
            )
    if correct.skip_batches:
        problems.append(
            "correct.skip_batches: with correct.when during the batches are those of distill; drop it"
        )
    if {"checkpoint_interval", "keep_checkpoints"} & correct.model_fields_set:
        problems.append(
            "correct.checkpoint_interval and keep_checkpoints: with correct.when during the teacher's "
            "state is in the checkpoints of distill; drop them"
        )
    if correct.valid_interval or correct.keep_every:
        problems.append(
            "correct.valid_interval and keep_every have no effect with correct.when during, because the "
            "checkpoints are those of the student; drop them, or set them in distill"
        )
    return problems


# Pruning


def search_or_target(recipe: Recipe) -> list[str]:
    if recipe.search and recipe.target != TargetConfig(align=recipe.target.align):
        return [
            "search and target exclude each other; drop one of the two (target.align is allowed with search)"
        ]
    return []


def depth_method_or_dropped_layers(recipe: Recipe) -> list[str]:
    if recipe.depth.method != "cosine" and recipe.target.drop_layers is not None:
        return [
            f"depth.method {recipe.depth.method} has no effect, because target.drop_layers lists the layers; "
            "drop one of the two"
        ]
    return []


def search_of_one_depth(recipe: Recipe) -> list[str]:
    if recipe.search is None or len(set(recipe.search.num_layers)) == 1:
        return []
    problems = []
    if recipe.distill.states:
        problems.append(
            "distill.states pairs the layers of one student, and the candidates of search differ in depth; "
            "give one search.num_layers, or drop states"
        )
    if recipe.depth.method == "block":
        problems.append(
            "depth.method block measures blocks of one length, and the candidates of search differ in depth; "
            "use drop or greedy, or give one search.num_layers"
        )
    return problems


def cosine_measures_nothing(recipe: Recipe) -> list[str]:
    changed = recipe.depth.changed(["num_samples", "micro_batch_size"])
    if recipe.depth.method == "cosine" and changed:
        return [
            f"depth.{', depth.'.join(changed)}: no effect with depth.method cosine; "
            "drop it, or set depth.method: drop, block or greedy"
        ]
    return []


def sizes_are_given(recipe: Recipe) -> list[str]:
    if recipe.prunes and not recipe.target.given and not recipe.search:
        return ["target is empty; give sizes, max_parameters or keep, or a section search"]
    return []


# Distillation


def logits_of_float32(recipe: Recipe) -> list[str]:
    return [
        f"{name}.logits_precision bf16 rounds the loss of a float32 model and saves no time; "
        "drop it, or set precision: bf16"
        for name, training in training_sections(recipe)
        if recipe.precision == "fp32" and training.logits_precision == "bf16"
    ]


def hidden_states(recipe: Recipe) -> list[str]:
    if not recipe.distill.states:
        return []
    teacher = recipe.teacher
    problems = []
    if teacher.placement == "cached":
        problems.append(
            "distill.states needs hidden states of the teacher, which a cache does not hold; "
            "set teacher.placement: colocated or remote, or drop states"
        )
    if teacher.payload != "hidden":
        problems.append(
            f"distill.states needs teacher.payload hidden, given {teacher.payload}; set hidden, or drop "
            "states"
        )
    if teacher.siblings:
        problems.append(
            "distill.states is for one student, and teacher.siblings adds students; "
            "train them in separate jobs, or drop states"
        )
    return problems


def divergence_of_top_k(recipe: Recipe) -> list[str]:
    if recipe.teacher.payload == "topk" and recipe.distill.divergence != "forward_kl":
        return [
            f"distill.divergence {recipe.distill.divergence} is not defined for teacher.payload topk; use "
            "forward_kl"
        ]
    return []


def early_stop_of_a_stream(recipe: Recipe) -> list[str]:
    if recipe.teacher.is_remote and recipe.distill.patience is not None:
        return [
            "distill.patience ends the run early, but a remote teacher has sent signals for later steps; "
            "set teacher.placement: colocated or cached, or drop patience"
        ]
    return []


# Rounds


def rounds_with_one_frozen_teacher(recipe: Recipe) -> list[str]:
    if not recipe.rounds:
        return []
    problems = []
    if recipe.corrects_during_distillation:
        problems.append(
            "rounds need a teacher that no round trains, and correct.when is during; set correct.when: before"
        )
    if recipe.teacher.siblings:
        problems.append(
            "rounds and teacher.siblings exclude each other, because siblings have no rounds; run the "
            "siblings in separate jobs"
        )
    return problems


def rounds_without_states(recipe: Recipe) -> list[str]:
    return [
        f"rounds.{name}: distill.states needs a student that is pruned from the teacher itself; set states: "
        "null in this round"
        for name, changes in recipe.rounds.items()
        if changes.distill.get("states", recipe.distill.states)
    ]


# Layout


def sequence_length_divides(recipe: Recipe) -> list[str]:
    layouts = {"parallel": recipe.parallel}
    if recipe.teacher.is_remote:
        layouts["teacher.parallel"] = recipe.teacher.parallel
    length = recipe.data.sequence_length
    problems = []
    search = recipe.search
    if search and search.latency_ms and search.context and search.context % recipe.parallel.sequence_multiple:
        problems.append(_must_be_multiple("search.context", search.context, "parallel", recipe.parallel))
    for name, parallel in layouts.items():
        if length % parallel.sequence_multiple:
            problems.append(_must_be_multiple("data.sequence_length", length, name, parallel))
    return problems


def _must_be_multiple(key: str, length: int, section: str, parallel: ParallelConfig) -> str:
    multiple = parallel.sequence_multiple
    nearest = max(1, round(length / multiple)) * multiple
    return (
        f"{key} {length} must be a multiple of {multiple} "
        f"({section}: 2 cp x tp under context and sequence parallelism); nearest {nearest}"
    )


def document_mask_of_local_layers(recipe: Recipe) -> list[str]:
    if not recipe.data.document_mask or recipe.transformer_impl == "local":
        return []
    return [
        f"data.document_mask needs the local layers, transformer_impl is {recipe.transformer_impl}: those of "
        "Transformer Engine need packed sequences; set transformer_impl: local, or drop document_mask"
    ]


RULES: tuple[Rule, ...] = (
    correction_trains_the_pruned_model,
    correction_during_distillation,
    search_or_target,
    depth_method_or_dropped_layers,
    search_of_one_depth,
    logits_of_float32,
    hidden_states,
    early_stop_of_a_stream,
    rounds_with_one_frozen_teacher,
    rounds_without_states,
    *ENGINE_RULES,
    sequence_length_divides,
    document_mask_of_local_layers,
)

RUN_RULES: tuple[Rule, ...] = (sizes_are_given, cosine_measures_nothing, divergence_of_top_k)
