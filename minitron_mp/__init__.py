"""Compression of large language models by the Minitron method, on Megatron-Core.

    import minitron_mp as mm

Layout     join_world, World, ParallelConfig
Models     import_hf, load_model, save_model, save_state, export_hf, ShardedModel, Arch, AXES
Pruning    score, Scores, ScoreConfig, make_plan, PrunePlan, TargetConfig, prune, masked
Training   Batch, ColocatedTeacher, distill, train, evaluate, DistillConfig, CorrectionConfig,
           StepMetrics
Loss       distillation_loss, Objective, TeacherHidden, TeacherLogits, TeacherTopK
Workflow   Recipe, load_recipe, make_recipe, compress, run_stage
Errors     InputError

examples/library.py uses most of them. Importing the package imports neither torch nor megatron: each
name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "errors": ("InputError",),
    "config.distillation": ("DistillConfig",),
    "config.parallel": ("ParallelConfig",),
    "config.pruning": ("ScoreConfig", "TargetConfig"),
    "config.recipe": ("Recipe", "load_recipe", "make_recipe"),
    "config.training": ("CorrectionConfig",),
    "distributed.batch": ("Batch",),
    "distributed.world": ("World", "join_world"),
    "losses.fused": ("distillation_loss",),
    "losses.objective": ("Objective", "TeacherHidden", "TeacherLogits", "TeacherTopK"),
    "models.arch": ("Arch",),
    "models.axes": ("AXES",),
    "models.sharded_model": ("ShardedModel",),
    "artifacts.hf_folder": ("import_hf", "export_hf"),
    "artifacts.saved_model": ("load_model", "save_model", "save_state"),
    "distillation.teacher": ("ColocatedTeacher",),
    "training.distill": ("distill", "train"),
    "training.metrics": ("StepMetrics",),
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

if TYPE_CHECKING:  # the same names for type checkers and editors
    from minitron_mp.artifacts.hf_folder import export_hf as export_hf
    from minitron_mp.artifacts.hf_folder import import_hf as import_hf
    from minitron_mp.artifacts.saved_model import (
        load_model as load_model,
    )
    from minitron_mp.artifacts.saved_model import (
        save_model as save_model,
    )
    from minitron_mp.artifacts.saved_model import (
        save_state as save_state,
    )
    from minitron_mp.config.distillation import DistillConfig as DistillConfig
    from minitron_mp.config.parallel import ParallelConfig as ParallelConfig
    from minitron_mp.config.pruning import ScoreConfig as ScoreConfig
    from minitron_mp.config.pruning import TargetConfig as TargetConfig
    from minitron_mp.config.recipe import (
        Recipe as Recipe,
    )
    from minitron_mp.config.recipe import (
        load_recipe as load_recipe,
    )
    from minitron_mp.config.recipe import (
        make_recipe as make_recipe,
    )
    from minitron_mp.config.training import CorrectionConfig as CorrectionConfig
    from minitron_mp.distillation.teacher import (
        ColocatedTeacher as ColocatedTeacher,
    )
    from minitron_mp.distributed.batch import Batch as Batch
    from minitron_mp.distributed.world import World as World
    from minitron_mp.distributed.world import join_world as join_world
    from minitron_mp.errors import InputError as InputError
    from minitron_mp.evaluation.quality import evaluate as evaluate
    from minitron_mp.losses.fused import distillation_loss as distillation_loss
    from minitron_mp.losses.objective import Objective as Objective
    from minitron_mp.losses.objective import TeacherHidden as TeacherHidden
    from minitron_mp.losses.objective import TeacherLogits as TeacherLogits
    from minitron_mp.losses.objective import TeacherTopK as TeacherTopK
    from minitron_mp.models.arch import Arch as Arch
    from minitron_mp.models.axes import AXES as AXES
    from minitron_mp.models.sharded_model import ShardedModel as ShardedModel
    from minitron_mp.pruning.importance import score as score
    from minitron_mp.pruning.make_plan import make_plan as make_plan
    from minitron_mp.pruning.masks import masked as masked
    from minitron_mp.pruning.plan import PrunePlan as PrunePlan
    from minitron_mp.pruning.scores import Scores as Scores
    from minitron_mp.pruning.slicing import prune as prune
    from minitron_mp.training.distill import distill as distill
    from minitron_mp.training.distill import train as train
    from minitron_mp.training.metrics import StepMetrics as StepMetrics
    from minitron_mp.workflow.run import compress as compress
    from minitron_mp.workflow.run import run_stage as run_stage
else:

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"minitron_mp has no {name}; public names: {', '.join(__all__)}")
        return getattr(import_module(f"minitron_mp.{_MODULE_OF[name]}"), name)

    def __dir__():
        return __all__
