"""Measured inference speed of architectures, as transformers models with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def measure(
    configs: dict[str, dict[str, Any]],
    *,
    dtype: torch.dtype,
    length: int,
    batch: int,
    new_tokens: int,
    rounds: int = 3,
) -> dict[str, dict[str, float]]:
    """Return model -> kind of work -> tokens/s.

    It is the median of rounds, in which the models alternate. configs: contents of config.json.
    Prefill reads `batch` texts of `length` tokens. Generation appends new_tokens to one text, and
    to `batch` texts, of length // 2 tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {}
    for name, content in configs.items():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=dtype)
        models[name] = model.to(device).eval()
    vocab_size = min(content["vocab_size"] for content in configs.values())
    tokens = torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    short = tokens[:, : length // 2]

    def generate(model: Any, prompt: torch.Tensor) -> None:
        fixed = {
            "min_new_tokens": new_tokens,
            "max_new_tokens": new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed)

    kinds: dict[str, tuple[int, Callable[[Any], Any]]] = {
        f"prefill of {batch} x {length}": (batch * length, lambda model: model(tokens, logits_to_keep=1)),
        f"generation of {batch}": (batch * new_tokens, lambda model: generate(model, short)),
        "generation of 1": (new_tokens, lambda model: generate(model, short[:1])),
    }
    speeds: dict[str, dict[str, float]] = {name: {} for name in models}
    with torch.no_grad():
        for kind, (count, work) in kinds.items():
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(rounds + 1):
                for name, model in models.items():
                    seconds[name].append(_timed(work, model))
            for name, times in seconds.items():
                speeds[name][kind] = count / statistics.median(times[1:])  # the first round warms up
    return speeds


def _timed(work: Callable[[Any], Any], model: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(model)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
