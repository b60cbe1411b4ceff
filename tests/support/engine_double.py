"""A double of Transformer Engine 2.16 in plain torch, for machines without it.

    import engine_double      # before megatron.core, in a new process

The modules have the constructors and forward signatures of the wheel (engine_signatures.json, which
test_engine_signatures.py compares), so Megatron's own wrappers build the model around them. They
compute what the real ones compute, without its kernels and without FP8: under fp8_autocast a layer
checks the sizes that FP8 products need, and computes in its own precision. Every other name of the
package is a class that cannot be constructed. What ran is in `calls`.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

VERSION = "2.16.1"
calls: Counter[str] = Counter()
"""Name -> number of calls: kernels, FP8 contexts by recipe, layers under FP8, buffers."""
settings: dict[str, dict[str, Any]] = {}
"""ub_name of a Linear -> the ub_* arguments of its constructor."""
fp8_recipes: list[Any] = []
"""The recipes of the FP8 contexts that are open, innermost last."""


class _Product(torch.autograd.Function):
    """x W^T. With `fuse` the backward pass adds dW to W.main_grad, as Transformer Engine does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fuse: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.fuse = weight, fuse
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad @ weight, None, None
        dw = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.fuse:
            calls["fused weight gradients"] += 1
            ctx.weight.main_grad.add_(dw)
            ctx.weight.grad_added_to_main_grad = True
            dw = torch.empty_like(weight)  # a dummy, which is not read
        return grad @ weight, dw, None


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert parallel_mode in ("column", "row"), parallel_mode
        size = tp_group.size()
        assert size == tp_size
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, size
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = save_original_input  # Megatron sets it on some layers in FP8
        self.sequence_parallel = size > 1 and sequence_parallel
        if ub_name is not None:
            names = (
                "ub_overlap_ag",
                "ub_overlap_rs",
                "ub_overlap_rs_dgrad",
                "ub_bulk_dgrad",
                "ub_bulk_wgrad",
            )
            values = (ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad)
            settings[ub_name] = dict(zip(names, values))
        rows = out_features // size if parallel_mode == "column" else out_features
        columns = in_features // size if parallel_mode == "row" else in_features
        self.in_features, self.out_features = columns, rows
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))
        if init_method is not None:
            # Megatron forks the random stream here, but the tests load the weights.
            with torch.no_grad():
                init_method(self.weight)
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0
        self.weight.partition_stride = 1
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(rows, dtype=params_dtype, device=device))
            self.bias.tensor_model_parallel = True
            self.bias.partition_dim, self.bias.partition_stride = 0, 1

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        from megatron.core.tensor_parallel import mappings

        if fp8_recipes:
            calls["layers in FP8"] += 1
            rows, columns = inp.numel() // inp.shape[-1], inp.shape[-1]
            # assert_dim_for_fp8_exec() of transformer_engine/pytorch/utils.py
            assert rows % 8 == 0, f"FP8 needs a multiple of 8 rows, given {tuple(inp.shape)}"
            assert columns % 16 == 0, f"FP8 needs a multiple of 16 columns, given {tuple(inp.shape)}"
            assert self.weight.shape[0] % 16 == 0, tuple(self.weight.shape)
        assert inp.dtype == self.weight.dtype, (inp.dtype, self.weight.dtype)
        x, group = inp, self.tp_group
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        # Real layers read this attribute in the forward pass, too.
        out = _Product.apply(x, self.weight, self.fuse_wgrad_accumulation and torch.is_grad_enabled())
        if self.parallel_mode == "row":
            if self.sequence_parallel:
                out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
            else:
                out = mappings.reduce_from_tensor_model_parallel_region(out, group=group)
        if self.return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias


class DotProductAttention(nn.Module):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: Any,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == "causal", attn_mask_type
        self.softmax_scale, self.cp_group = softmax_scale, cp_group
        self.heads, self.groups = num_attention_heads // tp_size, (num_gqa_groups or 1) // tp_size

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Any = None,
        cu_seqlens_kv: Any = None,
        cu_seqlens_q_padded: Any = None,
        cu_seqlens_kv_padded: Any = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Any = None,
        alibi_slopes: Any = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
    ) -> Tensor:
        from minitron_mp.models.layers import Attention

        assert (query_layer.shape[2], key_layer.shape[2]) == (self.heads, self.groups)
        group = self.cp_group or types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        attention = Attention(
            None, softmax_scale=self.softmax_scale, pg_collection=types.SimpleNamespace(cp=group)
        )
        return attention(query_layer, key_layer, value_layer)


class FusedAdam(torch.optim.Optimizer):
    """Adam in the state layout of Transformer Engine, by the double that runs on CPUs."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = int(group.get("step") or 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def multi_tensor_applier(op: Any, noop_flag_buffer: Tensor, tensor_lists: list, *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_scale(chunk_size: int, noop: Tensor, lists: list, scale: Any) -> None:
    for source, target in zip(*lists):
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk_size: int, noop: Tensor, lists: list, per_tensor: bool = False) -> Any:
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm()[None], norms


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Any = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Any = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    assert tensor_format == "sbhd"
    assert not interleaved
    assert cp_size == 1
    width = freqs.shape[-1]
    rotated, rest = t[..., :width].float(), t[..., width:]
    low, high = rotated.chunk(2, -1)
    rotated = rotated * freqs.cos() + torch.cat([-high, low], -1) * freqs.sin()
    return torch.cat([rotated.to(t.dtype), rest], -1)


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, margin: int, centered: bool
) -> tuple[Tensor, None, Tensor]:
    calls["rmsnorm_fwd"] += 1
    assert x.dim() == 2
    assert dtype == x.dtype == weight.dtype
    assert not centered
    inverse = (x.float().square().mean(-1) + eps).rsqrt()
    return (x.float() * inverse[:, None] * weight.float()).to(dtype), None, inverse


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    calls["rmsnorm_bwd"] += 1
    assert dz.shape == x.shape
    assert inverse.dtype is torch.float32
    normed = x.float() * inverse[:, None]
    g = dz.float() * weight.float()
    dx = inverse[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz.float() * normed).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    margin: int,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    calls["layernorm_fwd"] += 1
    assert x.dim() == 2
    assert dtype == x.dtype == weight.dtype
    assert centered
    mean = x.float().mean(-1)
    inverse = (x.float().var(-1, unbiased=False) + eps).rsqrt()
    normed = (x.float() - mean[:, None]) * inverse[:, None]
    return (normed * (weight.float() + 1) + bias.float()).to(dtype), mean, inverse


def layernorm_bwd(
    dz: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, margin: int, centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    calls["layernorm_bwd"] += 1
    normed = (x.float() - mean[:, None]) * inverse[:, None]
    g = dz.float() * (weight.float() + 1)
    dx = g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True)
    dw, db = (dz.float() * normed).sum(0), dz.float().sum(0)
    return (inverse[:, None] * dx).to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype)


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Any:
    calls[f"fp8_autocast {type(fp8_recipe).__name__}"] += 1
    fp8_recipes.append(fp8_recipe)
    try:
        yield
    finally:
        fp8_recipes.pop()


@contextmanager
def fp8_model_init(
    enabled: bool = True, recipe: Any = None, preserve_high_precision_init_val: bool = False
) -> Any:
    calls["fp8_model_init"] += 1
    yield


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group"):
        kwargs.pop(name, None)
    return torch_checkpoint(function, *args, use_reentrant=True, preserve_rng_state=False, **kwargs)


def get_cpu_offload_context(
    enabled: bool = False,
    num_layers: int | None = 1,
    model_layers: int = 1,
    offload_activations: bool = True,
    offload_weights: bool = False,
    double_buffering: bool = False,
    manual_synchronization: bool = False,
    retain_pinned_cpu_buffers: bool = False,
    offload_stream: Any = None,
) -> Any:
    assert not enabled
    return nullcontext(), lambda x: x


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return bool(fp8_recipes)


class UserBufferQuantizationMode(enum.Enum):
    NONE = "none"
    FP8 = "fp8"


def initialize_ub(
    shape: list,
    tp_size: int,
    use_fp8: bool = False,
    quantization_modes: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    ub_cfgs: Any = None,
    bootstrap_backend: Any = None,
) -> None:
    calls[f"initialize_ub {shape} {tp_size} {quantization_modes[0].value}"] += 1


def destroy_ub() -> None:
    calls["destroy_ub"] += 1


class _Recipe:
    def __init__(self, **values: Any):
        self.__dict__.update(values)


class _SplitAlongDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Any) -> Any:
        ctx.dim = dim
        return tuple(part.contiguous() for part in torch.split(x, sizes, dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.cat(grads, ctx.dim), None, None


class _Absent:
    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError(f"{type(self).__name__} has no double")


RECIPES = {
    name: type(name, (_Recipe,), {})
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling")
}
MEMBERS: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": VERSION},
    "transformer_engine.common.recipe": {
        **RECIPES,
        "Format": enum.Enum("Format", ["E4M3", "HYBRID"]),
    },
    "transformer_engine.pytorch": {
        "Linear": Linear,
        "DotProductAttention": DotProductAttention,
        "fp8_autocast": fp8_autocast,
        "fp8_model_init": fp8_model_init,
    },
    "transformer_engine.pytorch.constants": {
        "TE_DType": {dtype: dtype for dtype in (torch.float32, torch.bfloat16)}
    },
    "transformer_engine.pytorch.fp8": {
        "FP8GlobalStateManager": FP8GlobalStateManager,
        "fp8_autocast": fp8_autocast,
        "fp8_model_init": fp8_model_init,
    },
    "transformer_engine.pytorch.cpu_offload": {"get_cpu_offload_context": get_cpu_offload_context},
    "transformer_engine.pytorch.distributed": {"checkpoint": checkpoint},
    "transformer_engine.pytorch.attention": {"_SplitAlongDim": _SplitAlongDim},
    "transformer_engine.pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
    "transformer_engine.pytorch.module.base": {
        "UserBufferQuantizationMode": UserBufferQuantizationMode,
        "initialize_ub": initialize_ub,
        "destroy_ub": destroy_ub,
    },
    "transformer_engine.pytorch.optimizers": {
        "FusedAdam": FusedAdam,
        "multi_tensor_applier": multi_tensor_applier,
        "multi_tensor_scale": multi_tensor_scale,
        "multi_tensor_l2norm": multi_tensor_l2norm,
    },
    "transformer_engine_torch": {
        "rmsnorm_fwd": rmsnorm_fwd,
        "rmsnorm_bwd": rmsnorm_bwd,
        "layernorm_fwd": layernorm_fwd,
        "layernorm_bwd": layernorm_bwd,
    },
}
"""Module -> the names that have a double."""
PACKAGES = ("transformer_engine", "transformer_engine_torch")


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].islower() and f"{self.__name__}.{name}" in MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        value = type(name, (_Absent,), {})
        setattr(self, name, value)
        return value


MODULES = {name.rsplit(".", depth)[0] for name in MEMBERS for depth in range(name.count(".") + 1)}
MODULES |= {"transformer_engine.pytorch.ops"}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] not in PACKAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Module(spec.name)
        module.__dict__.update(MEMBERS.get(spec.name, {}))
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


def _install() -> None:
    assert "megatron.core" not in sys.modules, "import engine_double before megatron.core"
    sys.meta_path.insert(0, _Finder())
    usual = importlib.metadata.version
    importlib.metadata.version = lambda name: VERSION if name in PACKAGES else usual(name)


_install()
