"""Recipe: one frozen object, made from YAML or Python, that every stage reads."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from minitron_mp.config.base import NOT_IN_RESULT, Section
from minitron_mp.config.data import DataConfig, EvaluateConfig, ExportConfig
from minitron_mp.config.distillation import DistillConfig, TeacherConfig
from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.paths import UserPath, variables_for_omegaconf
from minitron_mp.config.pruning import DepthConfig, ScoreConfig, SearchConfig, TargetConfig
from minitron_mp.config.rules import rule_problems
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.errors import InputError, refuse

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails


RESOLVED_RECIPE = "resolved_recipe.yaml"
"""File in the output folder with the recipe of the last command, with all defaults."""


class Recipe(Section):
    """All settings of one compression run."""

    model: UserPath = Field(min_length=1)
    """Hugging Face folder of the model to prune: config.json, safetensors, tokenizer."""
    output: UserPath = Field(min_length=1)
    """Folder for all artifacts."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed for the split of the text into parts and for the order of the samples."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations. Optimizer state and gradients are float32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers: Megatron-Core's (local) or Transformer Engine's. auto: use
    Transformer Engine in bf16 on a GPU if it is installed, else local."""
    timeout_minutes: float = Field(default=30, gt=0, json_schema_extra=NOT_IN_RESULT)
    """Timeout of a collective. A job with a rank that hangs ends after this time. It must be longer
    than the longest work of one rank alone, such as a checkpoint on a slow disk. Work of rank 0 that
    takes long has no timeout."""
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


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted overrides ("distill.steps=10") and return the recipe.

    It raises one InputError that lists all mistakes.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError
    from yaml.reader import ReaderError

    if not Path(path).is_file():
        raise InputError(f"no recipe at {path}; give a YAML file such as examples/quickstart.yaml")
    refuse(
        "an override must be a dotted key and a value, like distill.steps=10; these are not:",
        [text for text in overrides if "=" not in text],
    )
    try:
        with open(path, "rb") as file:  # YAML recognises UTF-8 and UTF-16 by their byte order marks
            loaded: Any = OmegaConf.load(file)
        if isinstance(loaded, DictConfig):
            loaded = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(loaded, resolve=False)
        if isinstance(values, dict):
            values = variables_for_omegaconf(values, Recipe.model_fields, str(path))
            values = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except InputError:
        raise
    except ReaderError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OmegaConfBaseException, YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} or an override cannot be read ({error}); correct it") from error
    return make_recipe(values, source=str(path))


def make_recipe(values: object, source: str = "recipe") -> Recipe:
    """Return the recipe of nested dictionaries.

    It raises one InputError that lists all mistakes, with the nearest known key.
    """
    if not isinstance(values, dict):
        raise InputError(
            f"{source} contains a {type(values).__name__}, not keys and values; write lines such as "
            "model: PATH"
        )
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        refuse(f"{source} cannot be used:", [row for e in error.errors() for row in _sentences(e)])
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
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} or less",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "model_type": "must be a section with keys and values",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_short": "must have {min_length} or more values",
    "tuple_type": "must be a list",
}
"""Type of a pydantic error -> the rule in plain English. Other errors keep pydantic's text."""


def _sentences(error: ErrorDetails) -> list[str]:
    """Return a validation error as sentences: one for each line of a validator of this package."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return [f"unknown key {key}; {_suggestion(error['loc'])}"]
    if error["type"] == "missing":
        return [f"{key} is missing; add it"]
    if error["type"] == "value_error":
        rows = error["msg"].removeprefix("Value error, ").splitlines()
        return [f"{key}: {row}" if key else row for row in rows]
    rule = _RULES.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    given = (
        "nothing (an empty value and ~ are null in YAML)" if error["input"] is None else repr(error["input"])
    )
    return [f"{key}: {rule}, given {given}"]


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
