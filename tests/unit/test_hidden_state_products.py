"""Products of the projection of hidden states against float64."""

from __future__ import annotations

import pytest
import torch

from minitron_mp.config.training import CorrectionConfig
from minitron_mp.distillation import hidden_states
from minitron_mp.distillation.hidden_states import _Projection, distance

ROWS, WIDTH, TEACHER_WIDTH = (24, 2), 96, 128
SETTINGS = CorrectionConfig(steps=1, warmup_steps=0, global_batch_size=1, lr=1e-3)


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return states of the student, states of the teacher, and W."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*ROWS, WIDTH, generator=generator).to(dtype)
    weight = torch.eye(TEACHER_WIDTH, WIDTH) + 0.05 * torch.randn(TEACHER_WIDTH, WIDTH, generator=generator)
    noise = 0.3 * torch.randn(*ROWS, TEACHER_WIDTH, generator=generator)
    return x, (x.float() @ weight.t() + noise).to(dtype), weight


def reference(x: torch.Tensor, t: torch.Tensor, weight: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """Return the loss and the gradients of x and W in float64."""
    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = distance(leaf @ w.t(), t.double(), kind).sum()
    return [loss.detach(), *torch.autograd.grad(loss, [leaf, w])]


def written_out(x: torch.Tensor, t: torch.Tensor, weight: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """Return the same from the products of _Projection."""
    projection = _Projection.create(weight.clone(), SETTINGS)
    leaf = projection.of(x).requires_grad_()
    loss = distance(leaf, t.float(), kind).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return [loss.detach(), projection.backward(x, gradient), projection.gradient]


def errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want)]


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_on_a_cpu_are_exact(kind, dtype):
    """float32 products of float32 or bf16 states."""
    x, t, weight = tensors(dtype)
    assert max(errors(written_out(x, t, weight, kind), reference(x, t, weight, kind))) < 1e-5


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_bf16_products_of_a_gpu_are_close(kind, monkeypatch):
    """The operands are bf16 and the results float32, as on a GPU. A float32 product emulates it.

    A rounded operand has an error of up to 0.4 %, 0.2 % on average. The gradients have the errors of
    two operands, and that of the forward pass.
    """
    x, t, weight = tensors(torch.bfloat16)
    monkeypatch.setattr(_Projection, "_operand", lambda self, x: self.weight.detach().to(x.dtype))
    monkeypatch.setattr(hidden_states, "for_product", lambda x, weight, dtype: weight)
    monkeypatch.setattr(hidden_states, "product", lambda x, weight, dtype: x.float() @ weight.float().t())
    monkeypatch.setattr(
        hidden_states, "add_weight_gradient", lambda dw, dz, x: dw.add_(dz.float().t() @ x.float())
    )
    got = written_out(x, t, weight, kind)
    assert got[1].dtype is torch.bfloat16
    assert got[2].dtype is torch.float32
    assert max(errors(got, reference(x, t, weight, kind))) < 0.01
