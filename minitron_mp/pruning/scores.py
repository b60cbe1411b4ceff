"""Importance scores of every axis and layer, and their file."""

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
"""Name of the layers' own scores in the file."""


@dataclass(frozen=True)
class Scores:
    """Importance, float32 on the CPU, under global numbering: the same on every rank.

    units: axis -> layer (NO_LAYER where all layers share the axis) -> scores [units].
    layers [L]: 1 - cosine of a layer's input and output, mean over tokens.
    """

    units: Mapping[str, Mapping[int, np.ndarray]]
    layers: np.ndarray

    def __getitem__(self, axis: str) -> Mapping[int, np.ndarray]:
        """layer -> scores [units] of an axis."""
        return self.units[axis]

    def tensors(self) -> dict[str, np.ndarray]:
        """Name in the file -> scores.

        An axis of single layers has "axis.layer", one that all layers share "axis".
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
        wanted = {LAYERS}
        for axis in AXES.values():
            wanted |= {_name(axis.name, layer) for layer in (layers if axis.per_layer else [NO_LAYER])}
        if set(tensors) != wanted:
            raise InputError(
                f"{path} does not hold the scores of every axis and layer "
                f"(missing: {_some(wanted - set(tensors))}; unknown: {_some(set(tensors) - wanted)}); "
                "run `minitron-mp score --force` again"
            )
        return cls.from_tensors(tensors)

    def check(self, arch: Arch) -> None:
        """InputError unless the scores fit the architecture and every one is finite."""
        problems = [problem for axis in AXES.values() for problem in self._axis_problems(axis, arch)]
        if self.layers.shape != (arch.num_layers,):
            problems.append(f"{LAYERS} has shape {self.layers.shape}, the model needs ({arch.num_layers},)")
        problems += [
            f"{name} holds a NaN or an infinity"
            for name, row in self.tensors().items()
            if not np.isfinite(row).all()
        ]
        refuse("these importance scores do not fit the model:", problems)

    def _axis_problems(self, axis: Axis, arch: Arch) -> list[str]:
        """The first problem with the shapes of one axis, if any."""
        rows, layers = self.units.get(axis.name, {}), axis.layers(arch)
        if sorted(rows) != layers:
            return [f"{axis.name} has scores of {len(rows)} layers, the model needs {len(layers)}"]
        for layer in layers:
            want = (axis.num_units(arch, layer),)
            if rows[layer].shape != want:
                name = _name(axis.name, layer)
                return [f"{name} has shape {rows[layer].shape}, the model needs {want}"]
        return []


def random_scores(arch: Arch, seed: int = 0) -> Scores:
    """Scores drawn at random: the baseline of importance, and a stand-in where only sizes count."""
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
    """The first few of many names."""
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") or "none"
