"""The recipe: one frozen object from YAML or Python that every stage reads. All checks of user input start here."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from minitron_mp.config.base import Section
from minitron_mp.config.data import DataConfig, EvaluateConfig, ExportConfig
from minitron_mp.config.distillation import DistillConfig, TeacherConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import DepthConfig, ScoreConfig, SearchConfig, TargetConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.errors import InputError, refuse


class Recipe(Section):
    """Everything about one compression run."""

    model: str = Field(min_length=1)
    """Hugging Face folder of the teacher: config.json, safetensors, tokenizer."""
    output: str = Field(min_length=1)
    """Folder that gets every artefact."""
    seed: int = Field(1234, ge=0, lt=2**32)
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights and activations; optimizer state and gradients are float32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose layers compute: Megatron-Core's own, or Transformer Engine's. auto: Transformer Engine's in bf16 on a GPU where it is installed."""
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    correct: CorrectionConfig | None = None
    """Teacher correction; without this section the teacher stays as it is."""
    score: ScoreConfig = ScoreConfig()
    depth: DepthConfig = DepthConfig()
    target: TargetConfig = TargetConfig()
    search: SearchConfig | None = None
    """Instead of sizes or a budget in `target`."""
    distill: DistillConfig = DistillConfig()
    teacher: TeacherConfig = TeacherConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = []
        if self.correct and self.teacher.model:
            problems.append(
                "correct trains the model that is cut, teacher.model is another one: correct that one in a run of its own, and drop one of the two"
            )
        if self.correct and self.corrects_meanwhile:
            problems += self._meanwhile(self.correct)
        if self.search and self.target != TargetConfig(align=self.target.align):
            problems.append(
                "search finds the sizes and target says something about them; drop one of the two (target.align may stay)"
            )
        if self.depth.method != "cosine" and self.target.drop_layers is not None:
            problems.append(
                f"target.drop_layers names the layers that go, so there is nothing for depth.method {self.depth.method} to find: drop one of the two"
            )
        if self.search and self.distill.states and len(set(self.search.num_layers)) != 1:
            problems.append(
                "distill.states pairs the layers of one student, candidates of search differ in depth: give one search.num_layers, or drop states"
            )
        if self.search and self.depth.method == "block" and len(set(self.search.num_layers)) != 1:
            problems.append(
                "depth.method block measures blocks of one length, the candidates of search differ in depth; use drop or greedy, or one search.num_layers"
            )
        for name, training in (("correct", self.correct), ("distill", self.distill)):
            if training and self.precision == "fp32" and training.logits_precision == "bf16":
                problems.append(
                    f"{name}.logits_precision bf16 would round a float32 model's loss and gain no time; drop it, or set precision: bf16"
                )
        if self.distill.states:
            t, what = self.teacher, "distill.states needs the teacher's states beside its hidden states"
            if t.placement == "cached":
                problems.append(
                    f"{what}, a cache holds none: set teacher.placement: colocated or remote, or drop the states"
                )
            if t.payload != "hidden":
                problems.append(f"{what}, teacher.payload is {t.payload}: set hidden, or drop the states")
            if t.siblings:
                problems.append(
                    "distill.states is for one student, teacher.siblings shares the stream: train them in jobs of their own, or drop the states"
                )
        problems += self.engine_problems()
        if self.search and self.search.latency_ms and self.search.context:
            parts = (2 * self.parallel.cp if self.parallel.cp > 1 else 1) * (
                self.parallel.tp if self.parallel.sequence_parallel else 1
            )
            if self.search.context % parts:
                problems.append(
                    f"search.context {self.search.context} must be a multiple of {parts} (2 cp x tp under context and sequence parallelism)"
                )
        layouts = {"parallel": self.parallel} | (
            {"teacher.parallel": self.teacher.parallel} if self.teacher.is_remote else {}
        )
        for name, p in layouts.items():
            parts = (2 * p.cp if p.cp > 1 else 1) * (p.tp if p.sequence_parallel else 1)
            if self.data.sequence_length % parts:
                near = max(1, round(self.data.sequence_length / parts)) * parts
                problems.append(
                    f"data.sequence_length {self.data.sequence_length} must be a multiple of {parts} "
                    f"({name}: 2 cp x tp under context and sequence parallelism); nearest {near}"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def engine_problems(self) -> list[str]:
        """What does not go with FP8 and the other keys of Transformer Engine."""
        problems, trainings = (
            [],
            {name: t for name, t in (("correct", self.correct), ("distill", self.distill)) if t},
        )
        precisions = {
            "correct": self.teacher_precision if self.corrects_meanwhile else self.precision,
            "distill": self.precision,
        }
        for name, training in trainings.items():
            keys = [
                f"{name}.{key}" for key in ("fp8", "tp_comm_overlap", "cuda_graphs") if getattr(training, key)
            ]
            if keys and self.transformer_impl == "local":
                problems.append(
                    f"{', '.join(keys)} is Transformer Engine's, transformer_impl is local: set transformer_engine or auto"
                )
            if training.fp8 and precisions[name] == "fp32":
                problems.append(
                    f"{name}.fp8 quantises what bf16 holds, the precision is fp32: set precision: bf16, or drop fp8"
                )
            if training.tp_comm_overlap and not self.parallel.sequence_parallel:
                problems.append(
                    f"{name}.tp_comm_overlap overlaps what sequence parallelism sends; set parallel.sequence_parallel: true, or drop it"
                )
            if training.tp_comm_overlap and training.fp8 == "blockwise":
                problems.append(
                    f"{name}.tp_comm_overlap sends no tensors that are scaled in blocks; set {name}.fp8: tensorwise, or drop tp_comm_overlap"
                )
            if training.cuda_graphs and training.fp8 not in (None, "tensorwise"):
                problems.append(
                    f"{name}.cuda_graphs goes with {name}.fp8 tensorwise, given {training.fp8}: set tensorwise, or drop cuda_graphs"
                )
            if training.cuda_graphs and training.fp8 and self.parallel.pp > 1:
                problems.append(
                    f"{name}.cuda_graphs with {name}.fp8 and pipeline stages: Megatron-Core 0.19 would go on with the FP8 weights of the second step; "
                    "set parallel.pp: 1, or drop one of them"
                )
            if training.cuda_graphs and self.parallel.vpp:
                problems.append(
                    f"{name}.cuda_graphs with parallel.vpp {self.parallel.vpp}: not supported; drop one of them"
                )
            if training.tp_comm_overlap and training.cuda_graphs:
                problems.append(
                    f"{name}.tp_comm_overlap and {name}.cuda_graphs: nobody has recorded its buffers' copies in a graph; drop one of them"
                )
        if self.corrects_meanwhile and self.distill.fp8 == "delayed" and self.correct and self.correct.fp8:
            problems.append(
                "distill.fp8 delayed keeps a history that each FP8 layer of the teacher in training would move on, too; set tensorwise"
            )
        if self.corrects_meanwhile and any(t.tp_comm_overlap for t in trainings.values()):
            problems.append(
                "tp_comm_overlap has buffers for one width of model, with correct.when during two are trained: drop it"
            )
        if self.corrects_meanwhile and any(t.cuda_graphs for t in trainings.values()):
            problems.append(
                "cuda_graphs records one model in training, with correct.when during there are two: drop it"
            )
        if self.distill.cuda_graphs and self.teacher.is_remote:
            problems.append(
                "distill.cuda_graphs: while a graph is recorded no other thread may use the GPU, and a remote teacher's signals arrive in one; "
                "set teacher.placement: colocated or cached, or drop cuda_graphs"
            )
        if self.search and self.distill.cuda_graphs:
            problems.append(
                "distill.cuda_graphs records one model in training, search trains several at once: give the sizes in target, or drop it"
            )
        if self.search and self.distill.tp_comm_overlap:
            problems.append(
                "distill.tp_comm_overlap has buffers for one width of model, search trains several: give the sizes in target, or drop it"
            )
        if self.teacher.fp8:
            if self.transformer_impl == "local":
                problems.append(
                    "teacher.fp8 is Transformer Engine's, transformer_impl is local: set transformer_engine or auto"
                )
            if self.teacher_precision == "fp32":
                problems.append(
                    "teacher.fp8 quantises what bf16 holds, the teacher's precision is fp32: set teacher.precision: bf16, or drop fp8"
                )
            if self.corrects_meanwhile:
                problems.append(
                    "teacher.fp8 is for a teacher that is not trained; with correct.when during set correct.fp8"
                )
        return problems

    def _meanwhile(self, correct: CorrectionConfig) -> list[str]:
        """What does not go with a teacher that is corrected during distillation."""
        d, problems = self.distill, []
        if self.teacher.placement != "colocated":
            problems.append(
                f"correct.when during trains the teacher beside the student; teacher.placement {self.teacher.placement} keeps it elsewhere"
            )
        if d.states:
            problems.append(
                "distill.states needs the states of a teacher that is not trained; use correct.when: before"
            )
        if correct.steps > d.steps:
            problems.append(
                f"correct.steps {correct.steps} is above distill.steps {d.steps}, and the teacher takes a step for each of the student's"
            )
        for name in ("global_batch_size", "micro_batch_size"):
            if getattr(correct, name) != getattr(d, name):
                problems.append(
                    f"correct.{name} {getattr(correct, name)} is not distill.{name} {getattr(d, name)}; during distillation both learn from one batch"
                )
        if (
            "checkpoint_interval" in correct.model_fields_set
            or "keep_checkpoints" in correct.model_fields_set
        ):
            problems.append(
                "correct.checkpoint_interval and keep_checkpoints: the teacher's state lies in the checkpoints of distill; drop them"
            )
        return problems

    @property
    def teacher_precision(self) -> Literal["bf16", "fp32"]:
        return self.teacher.precision or self.precision

    @property
    def base(self) -> str:
        """The stage whose model is scored and cut."""
        return "correct" if self.correct and self.correct.when == "before" else "import"

    @property
    def corrects_meanwhile(self) -> bool:
        """Whether the teacher is corrected while the student is distilled from it."""
        return self.correct is not None and self.correct.when == "during"

    @property
    def tutor(self) -> str:
        """The stage whose model is distilled from."""
        return "import-teacher" if self.teacher.model else self.base

    @property
    def root(self) -> Path:
        return Path(self.output)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides ("distill.steps=10") and check everything; InputError lists all mistakes."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not Path(path).is_file():
        raise InputError(f"no recipe at {path}; give a YAML file such as examples/quickstart.yaml")
    refuse(
        "an override is a dotted key and a value, like distill.steps=10; this is not:",
        [text for text in overrides if "=" not in text],
    )
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} or an override cannot be read: {error}") from error
    return make_recipe(values, source=str(path))


def make_recipe(values: Any, source: str = "recipe") -> Recipe:
    """Recipe from nested dictionaries; InputError lists all mistakes, with the nearest key for a misspelt one."""
    if not isinstance(values, dict):
        raise InputError(f"{source} holds {type(values).__name__}, not keys and values")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        refuse(f"{source} cannot be used:", [row for e in error.errors() for row in _rows(e)])
        raise


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML, defaults included."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(recipe.model_dump()), path)


def _rows(error: Any) -> list[str]:
    """One validation error of pydantic, a sentence for each line that a validator wrote, with the nearest key for an unknown one."""
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            kinds = typing.get_args(annotation := section.model_fields[part].annotation)
            section = kinds[0] if kinds else annotation  # Correct | None
        known = list(section.model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]), known, 1, 0.5)
        return [
            f"unknown key {where}"
            + (f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(known)}")
        ]
    if error["type"] == "missing":
        return [f"{where} is missing"]
    text = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f", given {error['input']!r}"
    return [f"{where}: {row}{given}" if where else row for row in text.splitlines()]
