"""Norms of Transformer Engine's layers, products of hidden states, and host waits on a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from cases import ARCHS, SEQUENCE_LENGTH, make_samples, microbatches

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.pruning import ScoreConfig
from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distillation.hidden_states import _Projection
from minitron_mp.distributed.world import join_world
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.pruning.importance import recording

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_engine = pytest.mark.skipif(not find_spec("transformer_engine"), reason="needs Transformer Engine")

ROWS, WIDTH = (256, 2), 512
BF16 = 0.01
"""bf16 rounds by up to 0.4 %, 0.2 % on average, and some values are rounded twice."""


class Config:
    """The fields of TransformerConfig that a norm reads."""

    params_dtype = torch.bfloat16
    sequence_parallel = False


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def error_of_norm(norm: torch.nn.Module, reference) -> dict[str, float]:
    """Return the errors of output and gradients of a norm against float64."""
    torch.manual_seed(0)
    norm = norm.cuda()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(*ROWS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn_like(x)
    out = norm(x)
    out.backward(gradient)
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, *norm.parameters())]
    want = reference(*leaves)
    want.backward(gradient.double())
    errors = {"output": error_of(out, want.detach()), "x": error_of(x.grad, leaves[0].grad)}
    for (name, parameter), leaf in zip(norm.named_parameters(), leaves[1:]):
        errors[name] = error_of(parameter.grad, leaf.grad)
    return errors


@needs_engine
def test_norms_match_float64():
    from minitron_mp.models.engine_layers import EngineLayerNorm1p, EngineRMSNorm

    rms = error_of_norm(EngineRMSNorm(Config, WIDTH, 1e-5), lambda x, w: F.rms_norm(x, w.shape, w, 1e-5))
    layer = error_of_norm(
        EngineLayerNorm1p(Config, WIDTH, 1e-5),
        lambda x, w, b: F.layer_norm(x, w.shape, w + 1, b, 1e-5),
    )
    print("errors of RMSNorm", rms, "LayerNorm1p", layer)
    assert max(*rms.values(), *layer.values()) < BF16


def test_products_of_hidden_states_match_float64():
    torch.manual_seed(0)
    x = torch.randn(*ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(640, WIDTH, device="cuda") / WIDTH**0.5
    gradient = torch.randn(*ROWS, 640, device="cuda")
    settings = CorrectionConfig(steps=1, warmup_steps=0, global_batch_size=1, lr=1e-3)
    projection = _Projection.create(weight.clone(), settings)
    out, dx = projection.of(x), projection.backward(x, gradient)
    assert out.dtype is projection.gradient.dtype is torch.float32
    wanted = x.double() @ weight.double().t()
    assert error_of(out, wanted) < BF16
    assert error_of(dx, gradient.double() @ weight.double()) < BF16
    dw = gradient.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
    assert error_of(projection.gradient, dw) < BF16


@pytest.mark.parametrize("implementation", ["local", pytest.param("transformer_engine", marks=needs_engine)])
def test_a_scoring_microbatch_does_not_wait(implementation):
    """After a first microbatch, which compiles the kernels."""
    arch = ARCHS["qwen2"]
    with join_world(ParallelConfig(), seed=1) as world, torch.no_grad():
        options = ModelOptions(
            precision="bf16",
            sequence_length=SEQUENCE_LENGTH,
            random_weights=True,
            transformer_impl=implementation,
        )
        model = build_model(arch, world, options).eval()
        batches = microbatches(make_samples(arch, 0, 2), 2, 0, 1)
        with recording(model, ScoreConfig()):
            model.forward(batches)
            torch.cuda.set_sync_debug_mode("error")
            try:
                model.forward(batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")
