"""Compression of large language models by the Minitron method, on Megatron-Core.

Importing the package imports neither torch nor megatron; the names below load their module when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "arch": ("Arch", "AXES"),
    "errors": ("InputError",),
    "config": ("Recipe", "load_recipe", "make_recipe"),
    "plan": ("Importance", "PrunePlan", "make_plan"),
    "parallel": ("World", "world"),
    "model": ("build_model", "logits"),
    "importance": ("recording", "score"),
    "slicing": ("prune",),
    "losses": ("distillation_loss",),
    "teacher": ("ColocatedTeacher",),
    "trainer": ("train",),
    "pipeline": ("compress", "run_stage"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"minitron_mp has no {name}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"minitron_mp.{_HOME[name]}"), name)
