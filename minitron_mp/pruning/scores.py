"""Importance scores, and the plan that says what to keep. Runs on a laptop: numpy only, no torchrun.

Width: 2407.14679 section 2.3 (rank, keep the top). Depth: keep layers. Heads are ranked inside each query group and every
kept group keeps as many, so that grouped-query attention stays regular. A query group (its key, value and queries) scores the l2
norm of its heads' scores, as a head does of its channels'; the papers keep all groups.
Scores agree between layouts to rounding only, so ties break by the lower index, and a cut whose gap is inside the rounding
noise is reported by close_cuts() and close_depth().
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_mp.artifacts.files import write_bytes
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch


@dataclass(frozen=True)
class Scores:
    """Scores, float32 on the CPU, under global numbering: the same on every rank.

    ffn [L, f], heads [L, np], hidden [h], layers [L] (1 - cosine of input and output, mean over tokens).
    """

    ffn: np.ndarray
    heads: np.ndarray
    hidden: np.ndarray
    layers: np.ndarray

    def save(self, path: Path, manifest: Manifest) -> None:
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in vars(self).items()}
        write_bytes(path, save(tensors, metadata={"manifest": manifest.model_dump_json()}))

    @classmethod
    def load(cls, path: Path) -> Scores:
        from safetensors.numpy import load_file

        tensors = load_file(path)
        fields = set(cls.__dataclass_fields__)
        if set(tensors) != fields:
            raise InputError(
                f"{path} holds {', '.join(sorted(tensors))}, not {', '.join(sorted(fields))}; run `minitron-mp score --force` again"
            )
        return cls(**tensors)

    def check(self, arch: Arch) -> None:
        """InputError unless shapes fit the architecture and every score is finite."""
        shapes = {
            "ffn": (arch.num_layers, arch.ffn_hidden_size),
            "heads": (arch.num_layers, arch.num_attention_heads),
            "hidden": (arch.hidden_size,),
            "layers": (arch.num_layers,),
        }
        problems = [
            f"{name} has shape {getattr(self, name).shape}, the model needs {shape}"
            for name, shape in shapes.items()
            if getattr(self, name).shape != shape
        ]
        problems += [
            f"{name} holds a NaN or an infinity"
            for name in shapes
            if not np.isfinite(getattr(self, name)).all()
        ]
        refuse("these importance scores do not fit the model:", problems)
