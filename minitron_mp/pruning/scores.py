"""Importance scores of every axis and layer, and the file format for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_mp.artifacts.files import write_bytes
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch
from minitron_mp.models.axes import AXES, NO_LAYER, Axis

LAYERS = "layers"
"""Name of the scores of layers in the file."""


@dataclass(frozen=True)
class Scores:
    """Importance scores, float32 on the CPU, in global numbering, equal on every rank.

    units: axis -> layer (NO_LAYER where all layers share the axis) -> scores [units].
    layers [L]: 1 - cosine of a layer's input and output, mean over tokens.
    """

    units: Mapping[str, Mapping[int, np.ndarray]]
    layers: np.ndarray

    def __getitem__(self, axis: str) -> Mapping[int, np.ndarray]:
        """Return layer -> scores [units] of an axis."""
        return self.units[axis]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return name in the file -> scores.

        The name is "axis.layer", or "axis" for an axis that all layers share.
        """
        named = {_name(axis, layer): row for axis, rows in self.units.items() for layer, row in rows.items()}
        return {**named, LAYERS: self.layers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Scores:
        units: dict[str, dict[int, np.ndarray]] = {}
        for name, row in tensors.items():
            if name != LAYERS:
                axis, _, layer = name.partition(".")
                units.setdefault(axis, {})[int(layer or NO_LAYER)] = row
        return cls(units, tensors[LAYERS])

    def save(self, path: Path, manifest: Manifest) -> None:
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(row, np.float32) for name, row in self.tensors().items()}
        write_bytes(path, save(tensors, metadata={"manifest": manifest.model_dump_json()}))

    @classmethod
    def load(cls, path: Path) -> Scores:
        from safetensors.numpy import load_file

        tensors = load_file(path)
        layers = range(len(tensors.get(LAYERS, ())))
        expected = {LAYERS}
        for axis in AXES.values():
            expected |= {_name(axis.name, layer) for layer in (layers if axis.per_layer else [NO_LAYER])}
        if set(tensors) != expected:
            raise InputError(
                f"{path} does not hold the scores of every axis and layer "
                f"(missing: {_some(expected - set(tensors))}; unknown: {_some(set(tensors) - expected)}); "
                "run `minitron-mp score --force` again"
            )
        return cls.from_tensors(tensors)

    def check(self, arch: Arch) -> None:
        """Raise an InputError unless the scores fit the architecture and all are finite."""
        problems = [problem for axis in AXES.values() for problem in self._axis_problems(axis, arch)]
        if self.layers.shape != (arch.num_layers,):
            problems.append(f"{LAYERS} has shape {self.layers.shape}, the model needs ({arch.num_layers},)")
        problems += [
            f"{name} contains NaN or infinity"
            for name, row in self.tensors().items()
            if not np.isfinite(row).all()
        ]
        refuse("these scores do not fit the model; run `minitron-mp score --force` again:", problems)

    def _axis_problems(self, axis: Axis, arch: Arch) -> list[str]:
        """Return the first problem with the shapes of one axis, if there is one."""
        rows, layers = self.units.get(axis.name, {}), axis.layers(arch)
        if sorted(rows) != layers:
            return [f"{axis.name} has scores of {len(rows)} layers, the model needs {len(layers)}"]
        for layer in layers:
            expected = (axis.num_units(arch, layer),)
            if rows[layer].shape != expected:
                name = _name(axis.name, layer)
                return [f"{name} has shape {rows[layer].shape}, the model needs {expected}"]
        return []


def random_scores(arch: Arch, seed: int = 0) -> Scores:
    """Return random scores: a baseline for importance, and a placeholder where only sizes matter."""
    draw = np.random.default_rng(seed)
    units = {
        axis.name: {
            layer: draw.random(axis.num_units(arch, layer), np.float32) for layer in axis.layers(arch)
        }
        for axis in AXES.values()
    }
    return Scores(units, draw.random(arch.num_layers, np.float32))


def _name(axis: str, layer: int) -> str:
    return axis if layer == NO_LAYER else f"{axis}.{layer}"


def _some(names: set[str]) -> str:
    """Return the first three names, joined for an error message."""
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") or "none"
