"""Modules of the local layers, and the deferred output layer.

s sequence  b microbatch  h hidden  v padded vocabulary  np heads  ng query groups  hn head width
under sequence parallelism s is s/tp, under context parallelism s/cp
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from minitron_mp.distributed.collectives import AllGatherSequence


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension.

    Its weight has Megatron's attribute sequence_parallel.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm1p(nn.Module):
    """Layer norm over the last dimension, with a bias.

    The stored weight is the weight minus one, so that weight decay moves the weight to one
    (Nemotron).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight + 1, self.bias, self.eps)


class Attention(nn.Module):
    """Causal scaled-dot-product attention with grouped queries.

    Under context parallelism each rank gathers the keys and values of the complete sequence.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ):
        super().__init__()
        self.scale = softmax_scale
        self.cp = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Return the attention output [s, b, np/tp hn].

        query [s, b, np/tp, hn]. key, value [s, b, ng/tp, hn]. Under context parallelism s is s/cp,
        in zig-zag order. attention_mask: `documents` of the batch, [b, s], or None.
        """
        s, b = query.shape[:2]
        mask = None
        if self.cp.size() > 1:
            key = self._gather_sequence(key)
            value = self._gather_sequence(value)
        if self.cp.size() > 1 or attention_mask is not None:
            mask = self._mask(s, key.shape[0], query.device, attention_mask)
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

    def _mask(
        self, num_queries: int, num_keys: int, device: torch.device, documents: Tensor | None
    ) -> Tensor:
        """Return bool [s/cp, s], or [b, 1, s/cp, s] for documents: whether a query of this rank may
        attend to a key.
        """
        positions = self._positions(num_queries, device)
        causal = positions[:, None] >= torch.arange(num_keys, device=device)
        if documents is None:
            return causal
        same_document = documents[:, positions, None] == documents[:, None, :]
        return (same_document & causal)[:, None]

    def _positions(self, num_queries: int, device: torch.device) -> Tensor:
        """Return the positions in the sequence of this rank's queries."""
        size, rank = self.cp.size(), self.cp.rank()
        if size == 1:
            return torch.arange(num_queries, device=device)
        half = num_queries // 2
        rows = torch.arange(half, device=device)
        return torch.cat([rank * half + rows, (2 * size - 1 - rank) * half + rows])

    def _gather_sequence(self, x: Tensor) -> Tensor:
        """Gather x [s/cp, ...], in zig-zag order, into [s, ...] in sequence order."""
        size = self.cp.size()
        parts = AllGatherSequence.apply(x, self.cp).view(2 * size, -1, *x.shape[1:])
        first_half = [parts[2 * i] for i in range(size)]
        second_half = [parts[2 * i + 1] for i in reversed(range(size))]
        return torch.cat(first_half + second_half)


class DeferredHead(ColumnParallelLinear):
    """Output layer that returns its input in the model's forward pass. The loss calls logits().

    It remains a module of the model, so Megatron handles its checkpoint keys, tied embeddings and
    overlapped parameter gathering.
    """

    @classmethod
    def replacing(
        cls, head: ColumnParallelLinear, config: TransformerConfig, tp_group: ProcessGroup
    ) -> DeferredHead:
        """Return a deferred layer with the weight of `head` (None if the embedding holds it)."""
        deferred = cls(
            head.input_size,
            head.output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=tp_group,
        )
        deferred.weight = head.weight
        return deferred

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        return hidden, None

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return logits [s, b, v/tp]. hidden: [s, b, h], with sequence parallelism [s/tp, b, h]."""
        # torch multiplies a non-contiguous tensor sample by sample. In bf16 on a CPU oneDNN then
        # fails, and torch stops using oneDNN.
        return super().forward(hidden.contiguous(), weight)[0]
