"""Distillation with Megatron-Bridge: pruned student, teacher and loss in Bridge's pretrain().

    from minitron_mp.integrations.megatron_bridge import (
        ColocatedTeacher, KDForwardStep, Objective, check_config, student_provider,
    )

    cfg.model = student_provider("out/student", sequence_length=4096)
    objective = Objective("forward_kl", kl_weight=1.0)
    step = KDForwardStep(ColocatedTeacher("out/teacher"), vocab_size=128256, objective=objective)
    check_config(cfg, step)                    # after all overrides
    pretrain(cfg, step, callbacks=[step])

model.py: the student, and models that Bridge built as input of prune() and score().
teacher.py: the two teachers. forward_step.py: KDForwardStep. checks.py: check_config.
export.py: export_student.

Only this folder imports megatron.bridge, inside the functions that need it. Bridge describes a model
in two ways. Both give chunks of Megatron-Core's GPTModel. This folder adds only hooks on these
chunks, which run before the chunks are wrapped:

    provider   Bridge 0.6: AutoBridge.to_megatron_provider(), hooks by register_pre_wrap_hook()
    config     Bridge's main branch: AutoBridge.get_model_config(), hooks in the list
               pre_wrap_hooks. Bridge 0.6 can also train such a config
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron_mp.integrations.megatron_bridge.checks import check_config
    from minitron_mp.integrations.megatron_bridge.export import export_student
    from minitron_mp.integrations.megatron_bridge.forward_step import KDForwardStep
    from minitron_mp.integrations.megatron_bridge.model import (
        arch_of,
        defer_head,
        load_pruned,
        pruned_config,
        sharded_model,
        slice_teacher,
        student_provider,
        world_of_provider,
    )
    from minitron_mp.integrations.megatron_bridge.teacher import ColocatedTeacher, RemoteTeacher
    from minitron_mp.losses.objective import Objective

__all__ = [
    "ColocatedTeacher",
    "KDForwardStep",
    "Objective",
    "RemoteTeacher",
    "arch_of",
    "check_config",
    "defer_head",
    "export_student",
    "load_pruned",
    "pruned_config",
    "sharded_model",
    "slice_teacher",
    "student_provider",
    "world_of_provider",
]

MODULES = {
    "check_config": f"{__name__}.checks",
    "export_student": f"{__name__}.export",
    "KDForwardStep": f"{__name__}.forward_step",
    "ColocatedTeacher": f"{__name__}.teacher",
    "RemoteTeacher": f"{__name__}.teacher",
    "Objective": "minitron_mp.losses.objective",
}
"""Public name -> module. All other names are in model.py. A name is imported at its first use."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"{__name__} has no {name}; public names: {', '.join(__all__)}")
    return getattr(import_module(MODULES.get(name, f"{__name__}.model")), name)
