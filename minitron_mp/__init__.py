"""Compression of large language models by the Minitron method, on Megatron-Core.

Importing the package imports neither torch nor megatron: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "models.arch": ("Arch",),
    "models.axes": ("AXES", "Axis"),
    "models.sharded_model": ("ShardedModel",),
    "errors": ("InputError",),
    "config.recipe": ("Recipe", "load_recipe", "make_recipe"),
    "pruning.plan": ("PrunePlan", "make_plan"),
    "pruning.scores": ("Scores",),
    "distributed.world": ("World", "join_world"),
    "models.build": ("ModelOptions", "build_model", "logits"),
    "artifacts.saved_model": ("load_model", "save_model", "save_state"),
    "pruning.importance": ("recording", "score"),
    "pruning.slicing": ("prune",),
    "losses.fused": ("distillation_loss",),
    "distillation.teacher": ("ColocatedTeacher",),
    "training.loop": ("train",),
    "training.options": ("RunOptions",),
    "training.distill": ("distill",),
    "evaluation.quality": ("evaluate",),
    "workflow.run": ("compress", "run_stage"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"minitron_mp has no {name}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"minitron_mp.{_MODULE_OF[name]}"), name)
