"""The prune plan: the layers, and the units of every axis, that a student keeps. Needs only numpy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from minitron_mp.artifacts.files import first_problem, read_json, write_text
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES, NO_LAYER, Axis

MOST_PROBLEMS = 8
"""Largest number of problems in one message."""

Kept = dict[int, list[int]]
"""Kept layer (NO_LAYER where all layers share the axis) -> kept units, ascending."""

Pairs = dict[int, list[tuple[int, int]]]
"""Kept layer -> (kept unit, pruned unit of its group whose residual it takes)."""


class PrunePlan(BaseModel):
    """The architectures of teacher and student, and the kept units in the teacher's numbering.

    Equal on every rank. Layers may keep different numbers of units; student.blocks has the numbers.
    The kept query groups are the groups of the kept heads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: Arch
    student: Arch
    layers: list[int]
    """Kept layers, ascending."""
    keep: dict[str, Kept]
    """Axis -> kept units. Every axis has an entry."""
    merge: dict[str, Pairs] = {}
    """Axis -> merged units. Only axes whose units are merged have an entry."""
    notes: list[str] = []

    @model_validator(mode="after")
    def _fits(self) -> PrunePlan:
        """Check all that slicing relies on, because a plan may be written by hand."""
        problems = _list_problems("layers", self.layers, self.student.num_layers, self.teacher.num_layers)
        problems += _key_problems("keep", self.keep, list(AXES))
        problems += _key_problems("merge", self.merge, [n for n in self.merge if n in mergeable_axes()])
        if not problems:
            for axis in AXES.values():
                problems += self._axis_problems(axis)
        if problems:
            raise ValueError("; ".join(problems[:MOST_PROBLEMS]))
        return self

    def _axis_problems(self, axis: Axis) -> list[str]:
        layers = self.layers if axis.per_layer else [NO_LAYER]
        problems = _key_problems(f"keep.{axis.name}", self.keep[axis.name], layers)
        if axis.name in self.merge:
            problems += _key_problems(f"merge.{axis.name}", self.merge[axis.name], layers)
        if problems:
            return problems
        for student_layer, layer in enumerate(layers):
            problems += self._layer_problems(axis, layer, student_layer)
        return problems

    def _layer_problems(self, axis: Axis, layer: int, student_layer: int) -> list[str]:
        kept = self.keep[axis.name][layer]
        size = axis.num_units(self.student, student_layer)
        limit = axis.num_units(self.teacher, layer)
        per_group = limit // axis.num_groups(self.teacher, layer)
        problems = _list_problems(_entry("keep", axis, layer), kept, size, limit)
        if axis.group is not None:
            groups = axis.num_groups(self.student, student_layer)
            counts = Counter(unit // per_group for unit in kept)
            if len(counts) != groups or set(counts.values()) != {size // groups}:
                problems.append(
                    f"{_entry('keep', axis, layer)} does not keep {size // groups} {axis.size.units} "
                    f"in each of {groups} {axis.group.units}"
                )
        if axis.name in self.merge and not _is_pairing(self.merge[axis.name][layer], kept, per_group):
            problems.append(
                f"{_entry('merge', axis, layer)} needs pairs (kept {axis.size.unit}, pruned {axis.size.unit} "
                f"of the same group), with each kept {axis.size.unit} at most once"
            )
        return problems

    def save(self, path: Path, manifest: Manifest) -> None:
        content = {"manifest": manifest.model_dump(mode="json"), **self.model_dump(mode="json")}
        write_text(path, json.dumps(content))

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        content = read_json(path, "plan --force")
        try:
            if not isinstance(content, dict):
                raise InputError(f"{path} contains no keys and values; run `minitron-mp plan --force`")
            content.pop("manifest", None)
            return cls.model_validate(content)
        except ValidationError as error:
            raise InputError(
                f"{path} is not a valid plan: {first_problem(error)}; "
                "correct it, or run `minitron-mp plan --force`"
            ) from error

    @property
    def dropped(self) -> list[int]:
        """Dropped layers, ascending."""
        return sorted(set(range(self.teacher.num_layers)) - set(self.layers))

    def units(self, axis: Axis, layer: int = NO_LAYER) -> np.ndarray:
        """Return the kept units of an axis in a layer (teacher's numbering), int64, ascending."""
        return np.array(self.keep[axis.name][layer if axis.per_layer else NO_LAYER], np.int64)

    def summary(self) -> list[tuple[str, str, str, str]]:
        """Return table rows (size, teacher, student, kept)."""
        return size_rows(self.teacher, self.student)


def size_rows(teacher: Arch, student: Arch) -> list[tuple[str, str, str, str]]:
    """Return table rows (size, teacher, student, kept). A size that differs by layer is a mean."""
    fields = [size.field for axis in AXES.values() for size in reversed(axis.sizes)]
    rows = []
    for name in ("num_layers", *fields, "kv_channels", "vocab_size"):
        before, after = (_mean_size(arch, name) for arch in (teacher, student))
        rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
    for label, embeddings in (("parameters", True), ("non-embedding parameters", False)):
        before, after = (a.num_parameters(embeddings=embeddings) for a in (teacher, student))
        rows.append((label, f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
    return rows


def _mean_size(arch: Arch, field: str) -> float:
    """Return a size of the architecture, or its mean over layers rounded to one decimal."""
    if not hasattr(arch.blocks[0], field):
        return getattr(arch, field)
    sizes = [getattr(block, field) for block in arch.blocks]
    return sizes[0] if len(set(sizes)) == 1 else round(sum(sizes) / len(sizes), 1)


def mergeable_axes() -> list[str]:
    """Return the axes whose kept units may take the residual of pruned ones."""
    return [axis.name for axis in AXES.values() if axis.merges]


def _entry(field: str, axis: Axis, layer: int) -> str:
    """Return the name of a list in the plan, for error messages."""
    return f"{field}.{axis.name}" + ("" if layer == NO_LAYER else f"[{layer}]")


def _key_problems(name: str, entries: dict, needed: Sequence[str | int]) -> list[str]:
    if sorted(map(str, entries)) == sorted(map(str, needed)):
        return []
    given = ", ".join(map(str, entries)) or "none"
    return [f"{name} has {given}, it needs {', '.join(map(str, needed)) or 'none'}"]


def _list_problems(name: str, entries: list[int], size: int, limit: int) -> list[str]:
    problems = []
    if len(entries) != size:
        problems.append(f"{name} has {len(entries)} entries, the student needs {size}")
    if sorted({i for i in entries if 0 <= i < limit}) != entries:
        problems.append(f"{name} is not strictly ascending from 0 to {limit - 1}")
    return problems


def _is_pairing(pairs: list[tuple[int, int]], kept: list[int], per_group: int) -> bool:
    """Return whether each pair is a kept and a pruned unit of one group, and no kept unit repeats."""
    return len({unit for unit, _ in pairs}) == len(pairs) and all(
        unit in kept and pruned not in kept and unit // per_group == pruned // per_group
        for unit, pruned in pairs
    )
