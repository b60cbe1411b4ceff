"""Recipe: one frozen object, made from YAML or Python, that every stage reads."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from minitron_mp.config.base import NOT_IN_RESULT, Section
from minitron_mp.config.data import DataConfig, EvaluateConfig, ExportConfig
from minitron_mp.config.distillation import DistillConfig, TeacherConfig
from minitron_mp.config.log import LogConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.paths import UserPath, variables_for_omegaconf
from minitron_mp.config.pruning import DepthConfig, ScoreConfig, SearchConfig, TargetConfig
from minitron_mp.config.rules import rule_problems
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.config.yaml_values import OVERRIDE, read_override, read_yaml_file
from minitron_mp.errors import InputError, refuse

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig
    from pydantic_core import ErrorDetails


RESOLVED_RECIPE = "resolved_recipe.yaml"
"""File in the output folder with the recipe of the last command, with all defaults."""


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a recipe was read. It does not matter for the equality of recipes."""

    file: Path | None = dataclasses.field(default=None, compare=False)


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
    _origin: _Origin = PrivateAttr(_Origin())

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = rule_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def root(self) -> Path:
        """The output folder."""
        return Path(self.output)

    @property
    def file(self) -> Path | None:
        """The file that load_recipe() read; None for a recipe that was made in Python."""
        return self._origin.file

    @property
    def teacher_precision(self) -> Literal["bf16", "fp32"]:
        """Precision of the teacher of distillation."""
        return self.teacher.precision or self.precision

    @property
    def pruning_base(self) -> str:
        """The stage whose model is scored and pruned."""
        return "correct" if self.correct and self.correct.when == "before" else "import"

    @property
    def distillation_teacher(self) -> str:
        """The stage whose model is the teacher of distillation."""
        return "import-teacher" if self.teacher.model else self.pruning_base

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
        refuse(f"{source} cannot be used:", _sentences(error.errors()))
        raise


def recipe_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, with all defaults. load_recipe() reads it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_without_references(recipe.model_dump())))


def _without_references(value: Any) -> Any:
    """Return the values with ${ escaped, because OmegaConf would read it as a reference."""
    if isinstance(value, dict):
        return {key: _without_references(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_references(part) for part in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def section_type(annotation: Any) -> type[Section] | None:
    """Return the section in the type of a field: CorrectionConfig for `CorrectionConfig | None`."""
    for kind in (annotation, *typing.get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


_RULES = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be keys and values",
    "finite_number": "must be finite",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_type": "must be an integer",
    "invalid_key": "keys must be text",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a section with keys and values",
    "path_or_paths": "must be a path or a list of paths",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "string_unicode": "must be UTF-8 text",
    "too_short": "must have {min_length} or more values",
    "tuple_type": "must be a list",
}
"""Type of a pydantic error -> the rule in plain English. Other errors keep pydantic's text."""


def _sentences(errors: Sequence[ErrorDetails]) -> list[str]:
    """Return validation errors as sentences: one for each line of a validator of this package.

    The rules of a field of two types are joined: "must be 'dynamic' or a number".
    """
    rules: dict[tuple[str, str], list[str]] = {}  # (start, end of a sentence) -> rules between them
    for error in errors:
        key = _key(error["loc"])
        if error["type"] == "extra_forbidden":
            rules[f"unknown key {key}; {_suggestion(error['loc'])}", ""] = []
        elif error["type"] == "missing":
            rules[f"{key} is missing; add it", ""] = []
        elif error["type"] == "value_error":
            for row in error["msg"].removeprefix("Value error, ").splitlines():
                rules[f"{key}: {row}" if key else row, ""] = []
        else:
            rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
            subject = "its key " if error["loc"][-1:] == ("[key]",) else ""
            others = rules.setdefault((f"{key}: {subject}", f", given {_given(error['input'])}"), [])
            others.append(rule.removeprefix("must be ") if others else rule)
    return [start + " or ".join(between) + end for (start, end), between in rules.items()]


def _given(value: object) -> str:
    return "nothing (an empty value and ~ are null in YAML)" if value is None else repr(value)


def _key(location: tuple[int | str, ...]) -> str:
    """Return the dotted key of an error, without the parts that pydantic adds.

    They are "[key]" for the key of a dictionary, and the kind of value that it tried: float.
    """
    section: type[Section] = Recipe
    parts = [part for part in location if part != "[key]"]
    for index, part in enumerate(parts):
        field = section.model_fields.get(str(part))
        inner = field and section_type(field.annotation)
        if inner:
            section = inner
            continue
        if field and len([kind for kind in typing.get_args(field.annotation) if kind is not type(None)]) > 1:
            is_union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
            del parts[index + 1 : index + 2 if is_union else index + 1]
        break
    return ".".join(map(str, parts))


def _suggestion(location: tuple[int | str, ...]) -> str:
    """Return what a user may have meant by an unknown key."""
    section: type[Section] = Recipe
    name = str(location[-1])
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = (field and section_type(field.annotation)) or section
    nearest = difflib.get_close_matches(name, section.model_fields, 1, 0.7)
    if nearest:
        return f"did you mean {nearest[0]}?"
    elsewhere = [key for key in _keys(Recipe) if key.split(".")[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"use one of {', '.join(section.model_fields)}"


def _keys(section: type[Section], prefix: str = "") -> list[str]:
    """Return the dotted keys of a section and of the sections inside it."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        inner = section_type(field.annotation)
        if inner is not None:
            keys += _keys(inner, f"{prefix}{name}.")
    return keys
