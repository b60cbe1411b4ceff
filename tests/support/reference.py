"""Plain, dense float64 implementations of what the library computes.

They share only the names of weights with the library.

s sequence  b samples  h hidden  f ffn  v padded vocabulary
np heads  ng query groups  hn head width  L layers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
ATTENTION, MLP = "self_attention.", "mlp."
QKV, PROJ = ATTENTION + "linear_qkv.", ATTENTION + "linear_proj.weight"
FC1, FC2 = MLP + "linear_fc1.", MLP + "linear_fc2.weight"
EMBEDDING, HEAD, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
FINAL_BIAS = "decoder.final_layernorm.bias"
OUTSIDE = (EMBEDDING, FINAL_NORM, FINAL_BIAS, HEAD)
HIDDEN_NORMS = (
    QKV + "layer_norm_weight",
    FC1 + "layer_norm_weight",
    FINAL_NORM,
    QKV + "layer_norm_bias",
    FC1 + "layer_norm_bias",
    FINAL_BIAS,
)


def layer_key(layer: int, name: str) -> str:
    """Checkpoint key of a parameter of a layer."""
    return f"decoder.layers.{layer}.{name}"


def of_layer(weights: Weights, layer: int) -> Weights:
    """Name inside the layer -> value."""
    prefix = layer_key(layer, "")
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def logits(arch: Any, weights: Weights, tokens: Tensor, kept: Sequence[int] | None = None) -> Tensor:
    """Return float64 logits [b, s, v] of tokens [b, s].

    kept: the only hidden channels that the norms read; their output is zero elsewhere.
    """
    return logits_and_states(arch, weights, tokens, kept)[0]


def logits_and_states(
    arch: Any, weights: Weights, tokens: Tensor, kept: Sequence[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return logits() and the outputs of each layer's input norm and of the final norm.

    The outputs are L + 1 tensors [b, s, h].
    """
    states = []
    w = {key: value.double() for key, value in weights.items()}
    x = w[EMBEDDING][tokens]  # [b, s, h]
    for layer in range(arch.num_layers):
        layer_weights = of_layer(w, layer)
        states.append(_layer_norm(arch, x, layer_weights, QKV, kept))
        x = x + _attention(arch, arch.blocks[layer], layer_weights, states[-1])
        up = _layer_norm(arch, x, layer_weights, FC1, kept) @ layer_weights[FC1 + "weight"].T
        if arch.activation == "swiglu":
            gate, up = up.chunk(2, -1)
            x = x + (F.silu(gate) * up) @ layer_weights[FC2].T
        else:
            x = x + up.clamp(min=0).square() @ layer_weights[FC2].T
    states.append(_norm(arch, x, w[FINAL_NORM], w.get(FINAL_BIAS), kept))
    return states[-1] @ (w[EMBEDDING] if arch.tied else w[HEAD]).T, states


def _layer_norm(
    arch: Any, x: Tensor, layer_weights: Weights, linear: str, kept: Sequence[int] | None
) -> Tensor:
    """The norm in front of a linear layer, QKV or FC1."""
    weight, bias = layer_weights[linear + "layer_norm_weight"], layer_weights.get(linear + "layer_norm_bias")
    return _norm(arch, x, weight, bias, kept)


def _norm(arch: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Sequence[int] | None) -> Tensor:
    kept = list(range(x.shape[-1]) if kept is None else kept)
    out, part = torch.zeros_like(x), x[..., kept]
    if arch.norm == "rms":
        out[..., kept] = _rms_norm(part, weight[kept], arch.norm_epsilon)
    else:
        centred = part - part.mean(-1, keepdim=True)
        out[..., kept] = _rms_norm(centred, weight[kept] + 1, arch.norm_epsilon) + bias[kept]
    return out


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _attention(arch: Any, block: Any, layer_weights: Weights, x: Tensor) -> Tensor:
    """Causal attention of one layer; rows of qkv are q .. q k v of one group after the other."""
    per_group = block.num_attention_heads // block.num_query_groups
    qkv = x @ layer_weights[QKV + "weight"].T + layer_weights.get(QKV + "bias", torch.zeros(1).double())
    qkv = qkv.view(*x.shape[:2], block.num_query_groups, per_group + 2, arch.kv_channels)
    q, k, v = qkv.split([per_group, 1, 1], dim=3)  # [b, s, ng, heads, hn]
    if arch.qk_norm:
        q = _rms_norm(q, layer_weights[ATTENTION + "q_layernorm.weight"], arch.norm_epsilon)
        k = _rms_norm(k, layer_weights[ATTENTION + "k_layernorm.weight"], arch.norm_epsilon)
    rotated = round(arch.kv_channels * arch.rotary_percent)
    q, k = (torch.cat([_rotate(x[..., :rotated], arch.rotary_base), x[..., rotated:]], -1) for x in (q, k))
    scores = torch.einsum("bsgqd,btgkd->bgqst", q, k) / arch.kv_channels**0.5
    s = x.shape[1]
    scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf)
    out = torch.einsum("bgqst,btgkd->bsgqd", scores.softmax(-1), v)
    return out.flatten(2) @ layer_weights[PROJ].T


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding, halves rotated; x [b, s, ng, heads, hn]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * base ** -(torch.arange(half).double() / half)
    cos, sin = (torch.cat([t, t], -1)[:, None, None] for t in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def masked_teacher(arch: Any, weights: Weights, plan: Any) -> tuple[Weights, Sequence[int]]:
    """Return the teacher's weights with dropped parts set to zero, and the kept hidden channels.

    Queries are merged. The result computes the same as the student.
    """
    w = {name: value.clone() for name, value in weights.items()}
    kept = plan.keep["hidden"][-1]
    hidden = _flags(kept, arch.hidden_size)
    w[EMBEDDING] *= hidden
    for layer in range(arch.num_layers):
        if layer not in plan.layers:
            w[layer_key(layer, PROJ)].zero_()
            w[layer_key(layer, FC2)].zero_()
            continue
        for name in (layer_key(layer, QKV + "weight"), layer_key(layer, QKV + "bias")):
            if name in w:
                w[name] = merged(arch, w[name], plan, layer)
        heads = _flags(plan.keep["heads"][layer], arch.num_attention_heads).repeat_interleave(
            arch.kv_channels
        )
        w[layer_key(layer, PROJ)] *= hidden[:, None] * heads
        w[layer_key(layer, FC2)] *= hidden[:, None] * _flags(plan.keep["ffn"][layer], arch.ffn_hidden_size)
    return w, kept


def _flags(kept: Sequence[int], size: int) -> Tensor:
    flags = torch.zeros(size)
    flags[list(kept)] = 1
    return flags


def merged(arch: Any, x: Tensor, plan: Any, layer: int) -> Tensor:
    """Merge queries in linear_qkv [(np + 2 ng) hn, ...] of a layer, in float64.

    2407.14679 section 2.3: query + (query - query of the pruned head).
    """
    per_group = arch.num_attention_heads // arch.num_query_groups
    old = x.double().unflatten(0, (arch.num_query_groups, per_group + 2, arch.kv_channels))
    new = old.clone()
    for kept, pruned in plan.merge["heads"][layer] if plan.merge else []:
        group, head = divmod(kept, per_group)
        new[group, head] = old[group, head] + (old[group, head] - old[group, pruned % per_group])
    return new.flatten(0, 2).to(x.dtype)


def sliced(arch: Any, weights: Weights, plan: Any) -> Weights:
    """The student's weights, cut from the teacher's by plain indexing, layer by layer."""
    out = {name: _hidden_part(name, weights[name], plan) for name in OUTSIDE if name in weights}
    for number, layer in enumerate(plan.layers):
        for name, value in of_layer(weights, layer).items():
            part = _layer_part(arch, name, value, plan, layer)
            out[layer_key(number, name)] = _hidden_part(name, part, plan)
    return out


def _layer_part(arch: Any, name: str, x: Tensor, plan: Any, layer: int) -> Tensor:
    """Cut heads and neurons from a weight of a kept layer."""
    per_group, width = arch.num_attention_heads // arch.num_query_groups, arch.kv_channels
    heads, ffn = plan.keep["heads"][layer], plan.keep["ffn"][layer]
    if name in (QKV + "weight", QKV + "bias"):
        groups = merged(arch, x, plan, layer).unflatten(0, (arch.num_query_groups, per_group + 2, width))
        slots = {
            g: [h % per_group for h in heads if h // per_group == g] + [per_group, per_group + 1]
            for g in range(arch.num_query_groups)
        }
        return torch.cat([groups[g][slot].flatten(0, 1) for g, slot in slots.items() if len(slot) > 2])
    if name == PROJ:
        return x.unflatten(1, (arch.num_attention_heads, width))[:, heads].flatten(1)
    if name == FC1 + "weight":
        return x.unflatten(0, (-1, arch.ffn_hidden_size))[:, ffn].flatten(0, 1)
    return x[:, ffn] if name == FC2 else x


def _hidden_part(name: str, x: Tensor, plan: Any) -> Tensor:
    """Cut hidden channels from a weight."""
    hidden = plan.keep["hidden"][-1]
    if name in (EMBEDDING, HEAD, QKV + "weight", FC1 + "weight"):
        x = x[:, hidden]
    if name in (PROJ, FC2, *HIDDEN_NORMS):
        x = x[hidden]
    return x


AGGREGATE = {
    "mean": lambda x, dim: x.abs().mean(dim),
    "l2": lambda x, dim: x.square().sum(dim).sqrt(),
    "var": lambda x, dim: x.var(dim, correction=0),
}


class PlainImportance:
    """Importance of a transformers model with Llama's module names, from full activations.

    2407.14679 section 2.2. Per sample and channel, aggregate over the sequence, then over samples.
    heads: l2 over the head width. hidden: outputs of the two norms of each layer, summed over
    layers. layers: 1 - cos(input, output).
    """

    def __init__(self, model: Any, samples: Tensor):
        """Run the model on token ids [n, s], one sample at a time, in its precision."""
        self.arch, self.seen = model.config, {}
        handles = []
        for number, layer in enumerate(model.model.layers):
            inputs = {"ffn": layer.mlp.down_proj, "heads": layer.self_attn.o_proj, "before": layer}
            outputs = {
                "norm1": layer.input_layernorm,
                "norm2": layer.post_attention_layernorm,
                "after": layer,
            }
            handles += [
                module.register_forward_pre_hook(lambda _, args, at=(name, number): self._keep(at, args[0]))
                for name, module in inputs.items()
            ]
            handles += [
                module.register_forward_hook(lambda _, __, out, at=(name, number): self._keep(at, out))
                for name, module in outputs.items()
            ]
        with torch.no_grad():
            for sample in samples:
                model(sample[None])
        for handle in handles:
            handle.remove()

    def _keep(self, at: tuple[str, int], value: Any) -> None:
        self.seen.setdefault(at, []).append((value[0] if isinstance(value, tuple) else value)[0])  # [s, d]

    def scores(self, batch: str, sequence: str) -> dict[str, np.ndarray]:
        """Return the scores by their names in the file of scores.

        batch, sequence: keys of AGGREGATE, in the order of the pairs of cases.py.
        "ffn.0" [f], "heads.0" [np], ..., hidden [h], layers [L]
        """

        def channels(name: str, layer: int) -> Tensor:
            per_sample = torch.stack([AGGREGATE[sequence](a, 0) for a in self.seen[name, layer]])
            return AGGREGATE[batch](per_sample, 0)

        layers = range(self.arch.num_hidden_layers)
        values = {f"ffn.{i}": channels("ffn", i) for i in layers}
        for i in layers:
            values[f"heads.{i}"] = channels("heads", i).view(self.arch.num_attention_heads, -1).norm(dim=1)
        values["hidden"] = sum(channels(name, i) for name in ("norm1", "norm2") for i in layers)
        values["layers"] = torch.stack([self._distance(i) for i in layers])
        return {name: value.double().numpy() for name, value in values.items()}

    def _distance(self, layer: int) -> Tensor:
        before, after = (torch.cat(self.seen[name, layer]) for name in ("before", "after"))
        return (1 - F.cosine_similarity(before, after, dim=-1)).mean()


def losses(
    arch: Any, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return per token (KL(teacher || student) at a temperature, cross-entropy).

    Logits are [..., v]; the padded vocabulary is left out.
    """
    z_s, z_t = student[..., : arch.vocab_size], teacher[..., : arch.vocab_size]
    log_s, log_t = (F.log_softmax(z / temperature, -1) for z in (z_s, z_t))
    return (log_t.exp() * (log_t - log_s)).sum(-1), F.cross_entropy(
        z_s.flatten(0, -2), labels.flatten(), reduction="none"
    ).view(labels.shape)


class PlainTraining:
    """Distillation by autograd and AdamW on dense float64 weights; step() makes one step.

    settings: a DistillConfig. Vectors (norm weights, biases) have no weight decay.
    history: (loss, kl, ce, gradient norm of the model); with hidden states also (L_is, alpha).
    projection [h_t, h_s]: its value at the start, if the hidden sizes differ.
    """

    def __init__(
        self,
        teacher_arch: Any,
        teacher: Weights,
        arch: Any,
        student: Weights,
        settings: Any,
        projection: Tensor | None = None,
    ):
        self.teacher_arch, self.teacher, self.arch, self.settings = teacher_arch, teacher, arch, settings
        self.weights = {key: value.double().requires_grad_() for key, value in student.items()}
        self.outside = {} if projection is None else {"projection": projection.double().requires_grad_()}
        self.alpha = (
            1.0 if settings.states is None or settings.states.weight == "dynamic" else settings.states.weight
        )
        self.moments = {
            key: (torch.zeros_like(value), torch.zeros_like(value))
            for key, value in (self.weights | self.outside).items()
        }
        self.history: list[tuple[float, ...]] = []

    def step(self, samples: dict[str, Tensor], lr: float) -> None:
        s, tokens, mask = self.settings, samples["tokens"], samples["loss_mask"].double()
        (z_s, student_states), (z_t, teacher_states) = (
            logits_and_states(self.arch, self.weights, tokens),
            logits_and_states(self.teacher_arch, self.teacher, tokens),
        )
        kl, ce = (
            (x * mask).sum() / mask.sum()
            for x in losses(self.arch, z_s, z_t, samples["labels"], s.temperature)
        )
        loss = s.kl_weight * s.temperature**2 * kl + s.ce_weight * ce
        inside, alpha = self._inside(student_states, teacher_states, mask), self.alpha
        loss = loss + alpha * inside
        every = self.weights | self.outside
        gradients = dict(zip(every, torch.autograd.grad(loss, list(every.values()))))
        norm = torch.stack([gradients[key].norm() for key in self.weights]).norm()
        self.history.append(
            (loss.item(), kl.item(), ce.item(), norm.item(), *((inside.item(), alpha) if s.states else ()))
        )
        if s.states and s.states.weight == "dynamic":
            self.alpha = (s.kl_weight * s.temperature**2 * kl / inside).item()
        clip = min(
            1.0, s.clip_grad / (norm.item() + 1e-6)
        )  # 1e-6 as in torch.nn.utils.clip_grad_norm_ and Megatron-Core
        with torch.no_grad():
            for key, weight in self.weights.items():
                self._update(key, weight, gradients[key] * clip, lr)
            for key, weight in self.outside.items():
                self._update(key, weight, gradients[key], lr)

    def _inside(self, student_states: list[Tensor], teacher_states: list[Tensor], mask: Tensor) -> Tensor:
        """Mean over tokens of the sum over pairs of the distance between states."""
        total = torch.zeros((), dtype=torch.float64)
        for j, i in self.settings.states.layers if self.settings.states else []:
            x, t = student_states[j], teacher_states[i]
            x = x @ self.outside["projection"].T if self.outside else x
            d = (
                1 - F.cosine_similarity(x, t, dim=-1)
                if self.settings.states.kind == "cosine"
                else (x - t).square().mean(-1)
            )
            total = total + (d * mask).sum() / mask.sum()
        return total

    def _update(self, key: str, weight: Tensor, gradient: Tensor, lr: float) -> None:
        s, number, (first, second) = self.settings, len(self.history), self.moments[key]
        first.mul_(s.adam_beta1).add_(gradient, alpha=1 - s.adam_beta1)
        second.mul_(s.adam_beta2).addcmul_(gradient, gradient, value=1 - s.adam_beta2)
        decay = s.weight_decay if weight.dim() > 1 else 0.0
        update = first / (1 - s.adam_beta1**number) / ((second / (1 - s.adam_beta2**number)).sqrt() + 1e-8)
        weight -= lr * (update + decay * weight)
