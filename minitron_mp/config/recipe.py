"""Recipe: one frozen object, made from YAML or Python, that every stage reads."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from minitron_mp.config.base import NOT_IN_RESULT, Section
from minitron_mp.config.data import DataConfig, EvaluateConfig, ExportConfig
from minitron_mp.config.distillation import DistillConfig, TeacherConfig
from minitron_mp.config.log import LogConfig
from minitron_mp.config.mistakes import sentences
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.paths import UserPath, variables_for_omegaconf
from minitron_mp.config.pruning import DepthConfig, ScoreConfig, SearchConfig, TargetConfig
from minitron_mp.config.rounds import (
    FIRST,
    RoundConfig,
    merged,
    of_round,
    round_problems,
)
from minitron_mp.config.rules import rule_problems
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.config.yaml_values import OVERRIDE, read_override, read_yaml_file
from minitron_mp.errors import InputError, refuse

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig


RESOLVED_RECIPE = "resolved_recipe.yaml"
"""File in the output folder with the recipe of the last command, with all defaults."""


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a recipe was read. It does not matter for the equality of recipes."""

    file: Path | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class _Round:
    """The place of a recipe in its run: the name of its round, and the recipe of the round before."""

    name: str = FIRST
    previous: Recipe | None = None


class Recipe(Section):
    """All settings of one compression run."""

    model: UserPath = Field(min_length=1)
    """Hugging Face folder of the model to prune: config.json, safetensors, tokenizer."""
    output: UserPath = Field(min_length=1)
    """Folder for all artifacts."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed for the split of the text into parts and for the order of the samples."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations. Optimizer state and gradients are float32, unless
    gradient_precision or moment_precision of a training run is bf16."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers: Megatron-Core's (local) or Transformer Engine's. auto: use
    Transformer Engine in bf16 on a GPU if it is installed, else local."""
    timeout_minutes: float = Field(default=30, gt=0, json_schema_extra=NOT_IN_RESULT)
    """Timeout of a collective. If a rank hangs, the others end after this time, and a Slurm job
    restarts its ranks. It must be longer than the longest work of one rank alone, such as a
    checkpoint on a slow disk. During long work of rank 0, such as reading the text, it is the
    timeout of a heartbeat of that process."""
    data: DataConfig = DataConfig()
    """Text for calibration, training and evaluation."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of the model over the ranks."""
    correct: CorrectionConfig | None = None
    """Teacher correction. Default: the teacher is not corrected."""
    score: ScoreConfig = ScoreConfig()
    """Importance scores."""
    depth: DepthConfig = DepthConfig()
    """Choice of the layers to drop."""
    target: TargetConfig = TargetConfig()
    """Sizes of the student, or a budget."""
    search: SearchConfig | None = None
    """Search of the sizes of the student. It replaces sizes or a budget in `target`."""
    distill: DistillConfig = DistillConfig()
    """Training of the student by distillation."""
    teacher: TeacherConfig = TeacherConfig()
    """The teacher of distillation."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation of teacher and student."""
    export: ExportConfig = ExportConfig()
    """The Hugging Face folder of the student."""
    log: LogConfig = LogConfig()
    """Experiment trackers."""
    rounds: dict[str, RoundConfig] = {}
    """Further rounds after the first one, by name, in their order. Each prunes and trains, or only
    trains, the student of the round before (docs/rounds.md)."""
    _origin: _Origin = PrivateAttr(_Origin())
    _round: _Round = PrivateAttr(_Round())

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = rule_problems(self) + round_problems(self.rounds)
        for name in [] if problems else self.rounds:
            try:
                Recipe.model_validate(self._values_of_round(name))
            except ValidationError as error:
                problems += [f"rounds.{name}: {row}" for row in sentences(error.errors(), Recipe)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _values_of_round(self, name: str) -> dict[str, Any]:
        return merged(self.model_dump(exclude_unset=True), name, self.rounds[name])

    @property
    def root(self) -> Path:
        """The folder of the artifacts of this round: `output`, or a folder in it."""
        return Path(self.output)

    @property
    def file(self) -> Path | None:
        """The file that load_recipe() read; None for a recipe that was made in Python."""
        return self._origin.file

    @property
    def all_rounds(self) -> list[Recipe]:
        """The recipe of each round, in order. The first one is this recipe."""
        recipes = [self]
        for name in self.rounds:
            recipe = Recipe.model_validate(self._values_of_round(name))
            recipe._round = _Round(name, recipes[-1])
            recipes.append(recipe)
        return recipes

    def of_round(self, name: str) -> Recipe:
        """Return the recipe of a round of this run; "" for the first. InputError without it."""
        recipes = {recipe.round_name: recipe for recipe in self.all_rounds}
        if (name or FIRST) not in recipes:
            raise InputError(
                f"--round {name}: the recipe has no such round; give one of {', '.join(recipes)}"
            )
        return recipes[name or FIRST]

    @property
    def round_name(self) -> str:
        """Name of this round."""
        return self._round.name

    @property
    def previous(self) -> Recipe | None:
        """Recipe of the round before; None in the first round."""
        return self._round.previous

    @property
    def earlier(self) -> list[Recipe]:
        """Recipes of the rounds before this one, in order."""
        return [] if self.previous is None else [*self.previous.earlier, self.previous]

    @property
    def run(self) -> Recipe:
        """The recipe of the first round, which has all rounds and the output folder of the run."""
        return [*self.earlier, self][0]

    def command(self, stage: str) -> str:
        """Return the command that runs a stage in this round: "prune --round narrow"."""
        is_complete = self.previous is None or " --round " in stage
        return stage if is_complete else of_round(stage, self.round_name)

    @property
    def teacher_precision(self) -> Literal["bf16", "fp32"]:
        """Precision of the teacher of distillation."""
        return self.teacher.precision or self.precision

    @property
    def prunes(self) -> bool:
        """Whether this round prunes a model before it trains."""
        return self.previous is None or self.target.given or self.search is not None

    @property
    def pruning_base(self) -> str:
        """The stage whose model is scored and pruned."""
        if self.previous is not None:
            return of_round("distill", self.previous.round_name)
        return self._corrected

    @property
    def initial_student(self) -> str:
        """The stage whose model is trained by distillation."""
        return "prune" if self.prunes else self.pruning_base

    @property
    def distillation_teacher(self) -> str:
        """The stage whose model is the teacher of distillation, in every round."""
        return "import-teacher" if self.teacher.model else self._corrected

    @property
    def _corrected(self) -> str:
        return "correct" if self.correct and self.correct.when == "before" else "import"

    @property
    def corrects_during_distillation(self) -> bool:
        """Whether the teacher is corrected while the student is distilled from it."""
        return self.correct is not None and self.correct.when == "during"

    def layer_problems(self, students: Collection[int], base: int, teacher: int) -> list[str]:
        """Return the problems of parallel.layers and the like with the depths of the models.

        students: numbers of layers of the student, or of all candidates of a search. base: of the
        model that is pruned.
        """
        problems = self.parallel.depth_problems(students, {base, teacher})
        return problems + self.teacher.parallel.depth_problems({teacher}, {teacher}, "teacher.parallel")

    @property
    def evaluated_models(self) -> dict[str, str]:
        """Name of each model that `evaluate` compares with the teacher -> the stage that wrote it."""
        stages = {"uncorrected": "import"} if self.correct else {}
        if self.previous is None and self.distillation_teacher != self.pruning_base:
            stages["unpruned"] = self.pruning_base
        for recipe in self.earlier:
            name = recipe.round_name
            stages[f"distilled ({name})"] = of_round("distill", name)
        if self.prunes:
            stages["pruned"] = "prune"
        return {**stages, "distilled": "distill"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides ("distill.steps=10") and return the recipe.

    A value of an override is the text itself unless it begins with a bracket, a brace or a quotation
    mark, as in "data.train=[a, b]". It raises one InputError that lists all mistakes.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse(
        "an override must be a dotted key and a value, like distill.steps=10; these are not:",
        [text for text in overrides if not OVERRIDE.fullmatch(text)],
    )
    content = read_yaml_file(path)
    if not isinstance(content, dict):
        return make_recipe(content, source=str(path))
    try:
        config = OmegaConf.create(content)
        for text in overrides:
            _apply_override(config, text)
        values: Any = OmegaConf.to_container(config, resolve=False)
        values = variables_for_omegaconf(values, Recipe.model_fields, str(path))
        values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except InputError:
        raise
    except (OmegaConfBaseException, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} or an override cannot be read ({error}); correct it") from error
    recipe = make_recipe(values, source=str(path))
    recipe._origin = _Origin(Path(path))
    return recipe


def _apply_override(config: DictConfig, text: str) -> None:
    """Set the key of an override. A dictionary is merged with the keys that are there."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, value = read_override(text)
    try:
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"the override {text!r} cannot be used ({str(error).splitlines()[0]}); write a dotted key and a "
            "value, like distill.steps=10"
        ) from error


def make_recipe(values: object, source: str = "recipe") -> Recipe:
    """Return the recipe of nested dictionaries.

    It raises one InputError that lists all mistakes, with the nearest known key.
    """
    if not isinstance(values, dict):
        content = "a list" if isinstance(values, list) else f"only {values!r}"
        raise InputError(f"{source} contains {content}, not keys and values; write lines such as model: PATH")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        refuse(f"{source} cannot be used:", sentences(error.errors(), Recipe))
        raise


def recipe_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with all defaults. load_recipe() reads it."""
    from omegaconf import OmegaConf

    values = recipe.model_dump(exclude={"rounds"})
    if recipe.rounds:
        values["rounds"] = {
            each.round_name: _given_keys(recipe.rounds[each.round_name], each)
            for each in recipe.all_rounds[1:]
        }
    return OmegaConf.to_yaml(OmegaConf.create(_without_references(values)))


def _given_keys(changes: RoundConfig, resolved: Recipe) -> dict[str, Any]:
    """Return the keys that a round gives, with the values that its recipe has."""
    values = resolved.model_dump()
    given = {section: getattr(changes, section) for section in RoundConfig.model_fields}
    return {section: {key: values[section][key] for key in keys} for section, keys in given.items() if keys}


def _without_references(value: Any) -> Any:
    """Return the values with ${ escaped, because OmegaConf would read it as a reference."""
    if isinstance(value, dict):
        return {key: _without_references(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_references(part) for part in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
