"""Compression of large language models by the Minitron method, on Megatron-Core.

    import minitron_mp as mm

Layout     join_world, World, ParallelConfig
Models     import_hf, load_model, save_model, save_state, export_hf, ShardedModel, Arch, AXES
Pruning    score, Scores, ScoreConfig, make_plan, PrunePlan, TargetConfig, prune, masked
Training   ColocatedTeacher, RemoteTeacher, distillation_loss, distill, train, DistillConfig, evaluate
Workflow   Recipe, load_recipe, make_recipe, compress, run_stage
Errors     InputError

examples/library.py uses most of them. Importing the package imports neither torch nor megatron: each
name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "errors": ("InputError",),
    "config.distillation": ("DistillConfig",),
    "config.parallel": ("ParallelConfig",),
    "config.pruning": ("ScoreConfig", "TargetConfig"),
    "config.recipe": ("Recipe", "load_recipe", "make_recipe"),
    "distributed.world": ("World", "join_world"),
    "losses.fused": ("distillation_loss",),
    "models.arch": ("Arch",),
    "models.axes": ("AXES",),
    "models.sharded_model": ("ShardedModel",),
    "artifacts.hf_folder": ("import_hf", "export_hf"),
    "artifacts.saved_model": ("load_model", "save_model", "save_state"),
    "distillation.teacher": ("ColocatedTeacher", "RemoteTeacher"),
    "training.distill": ("distill",),
    "training.loop": ("train",),
    "evaluation.quality": ("evaluate",),
    "pruning.importance": ("score",),
    "pruning.masks": ("masked",),
    "pruning.make_plan": ("make_plan",),
    "pruning.plan": ("PrunePlan",),
    "pruning.scores": ("Scores",),
    "pruning.slicing": ("prune",),
    "workflow.run": ("compress", "run_stage"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = [*sorted(_MODULE_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"minitron_mp has no {name}; public names: {', '.join(__all__)}")
    return getattr(import_module(f"minitron_mp.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
