"""A sharded Megatron-Core GPTModel from an Arch.

The head is deferred: the model's last stage returns the hidden states after the final norm, and the loss applies the output
layer (logits()). So a teacher keeps 2h bytes a token between its forward pass and the loss instead of 4v, and the loss
can work in chunks.

    s sequence  b microbatch  h hidden  v padded vocabulary; under sequence parallelism s/tp, under context parallelism s/cp
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from minitron_mp.distributed.collectives import AllGatherSequence


def engine_modules() -> Any:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class OpenNorms(TESpecProvider):
        """Transformer Engine's modules, each norm beside its linear layer instead of inside."""

        def fuse_layernorm_and_linear(self) -> bool:
            return False

    return OpenNorms()


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension; its weight carries Megatron's sequence-parallel mark."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm1p(nn.Module):
    """Layer norm over the last dimension with a bias; its weight is stored less one, so that weight decay pulls it to one (Nemotron)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) for _ in range(2)
        )
        self.weight.sequence_parallel = self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, self.eps)


class Attention(nn.Module):
    """Causal scaled-dot-product attention with grouped queries; context parallel by gathering keys and values."""

    def __init__(
        self, config: Any, *, softmax_scale: float | None = None, pg_collection: Any = None, **_: Any
    ):
        super().__init__()
        self.scale, self.cp = softmax_scale, pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """query [s, b, np/tp, hn], key and value [s, b, ng/tp, hn] -> [s, b, np/tp hn]; s is s/cp in zig-zag order."""
        s, b = query.shape[:2]
        mask = None
        if self.cp.size() > 1:
            key, value = (self._whole_sequence(x) for x in (key, value))
            n, r, half = self.cp.size(), self.cp.rank(), s // 2
            rows = torch.arange(half, device=query.device)
            positions = torch.cat([r * half + rows, (2 * n - 1 - r) * half + rows])
            mask = positions[:, None] >= torch.arange(key.shape[0], device=query.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, -1)

    def _whole_sequence(self, x: Tensor) -> Tensor:
        """[s/cp, ...] in zig-zag order -> [s, ...] in order."""
        n = self.cp.size()
        parts = AllGatherSequence.apply(x, self.cp).view(2 * n, -1, *x.shape[1:])
        return torch.cat([parts[2 * i] for i in range(n)] + [parts[2 * i + 1] for i in reversed(range(n))])


class DeferredHead(ColumnParallelLinear):
    """The output layer, applied by the loss: in the model's forward pass it hands the hidden states through.

    It stays a module of the model, so checkpoint keys, tied embeddings and overlapped parameter gathering are Megatron's own.
    """

    @classmethod
    def taking_over(
        cls, head: ColumnParallelLinear, config: TransformerConfig, tp_group: Any
    ) -> DeferredHead:
        """The same layer around the same weight (none when it is the embedding's)."""
        new = cls(
            head.input_size,
            head.output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=tp_group,
        )
        new.weight = head.weight
        return new

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        return hidden, None

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        # Contiguous, or torch multiplies sample by sample; in bf16 on a CPU oneDNN then fails and torch switches it off for good.
        return super().forward(hidden.contiguous(), weight)[0]
