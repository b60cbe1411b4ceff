"""Faults of a job. Python imports this file at its start if this folder is on PYTHONPATH.

MINITRON_TEST_NAN=RANK:STEP:PARAMETER   the gradient of a parameter is NaN on one rank at a step
MINITRON_TEST_BAD_NODE=NODE             the name of this node cannot be resolved during `doctor`
"""

import importlib.abc
import importlib.util
import os
import socket
import sys


class _WrapTrainingRun(importlib.abc.MetaPathFinder):
    """Changes minitron_mp.training.run when it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "minitron_mp.training.run":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_wrap(module):
            load(module)
            rank, step, parameter = os.environ["MINITRON_TEST_NAN"].split(":")
            module.TrainingRun.forward_backward = _with_nan(
                module.TrainingRun.forward_backward, int(rank), int(step), parameter
            )

        spec.loader.exec_module = load_and_wrap
        return spec


def _with_nan(forward_backward, rank, step, parameter):
    def wrapped(run, *arguments, **options):
        hooks = []
        if run.world.rank == rank and run.steps_done == step - 1:
            hooks = [
                tensor.register_hook(lambda gradient: gradient * float("nan"))
                for chunk in run.model.chunks
                for name, tensor in chunk.named_parameters()
                if name.endswith(parameter)
            ]
        try:
            return forward_backward(run, *arguments, **options)
        finally:
            for hook in hooks:
                hook.remove()

    return wrapped


if "MINITRON_TEST_NAN" in os.environ:
    sys.meta_path.insert(0, _WrapTrainingRun())
is_bad = os.environ.get("MINITRON_TEST_BAD_NODE") == os.environ.get("SLURMD_NODENAME", "none")
if is_bad and "doctor" in sys.orig_argv:
    socket.gethostname = lambda: "no-address.invalid"
