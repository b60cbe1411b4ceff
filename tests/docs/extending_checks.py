"""What the additions of docs/extending.md compute, one function for each section of the page.

test_extending.py runs `python extending_checks.py SECTION` in a copy of the repository to which the
diff of the section was applied.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock


def check_family() -> None:
    """The tests of families pass with a case of the new one, such as logits of transformers."""
    import pytest

    assert pytest.main(["-q", "tests/unit/test_hf.py", "-k", "arcee or every_file"]) == 0


def check_axis() -> None:
    """Whole tiles are kept, and the masked teacher equals the sliced student, on one rank."""
    import torch
    from cases import DEFAULT_PAIR, Layout, make_samples, make_weights
    from model_workers import (
        global_logits,
        joined,
        load,
        manifest,
        read_tensors,
        score_samples,
        write_weights,
    )

    from minitron_mp.artifacts.checkpoint import save_checkpoint
    from minitron_mp.config.pruning import TargetConfig
    from minitron_mp.models.arch import Arch
    from minitron_mp.pruning.make_plan import make_plan
    from minitron_mp.pruning.masks import masked
    from minitron_mp.pruning.slicing import prune

    arch = Arch(
        family="llama",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=131,
        max_position_embeddings=64,
        tied=False,
    )
    weights, samples = make_weights(arch), make_samples(arch, 0, 8)
    write_weights(Path("teacher"), arch, weights)
    with torch.no_grad(), joined(Layout("one", 1)) as world:
        teacher = load(arch, Path("teacher"), world)
        scores = score_samples(teacher, samples, DEFAULT_PAIR)
        plan = make_plan(scores, arch, TargetConfig(ffn_hidden_size=64, align=32))
        assert [len(plan.keep["ffn"][layer]) for layer in range(2)] == [2, 2]  # of 4 tiles of 32 neurons
        whole = global_logits(teacher, samples)
        with masked(teacher, plan):
            want = global_logits(teacher, samples)
        save_checkpoint(prune(teacher, plan), Path("student"), manifest("prune", plan.student))
        found = global_logits(load(plan.student, Path("student"), world), samples)
    largest = want.abs().max().item()
    assert (want - whole).abs().max().item() > 0.01 * largest, "nothing that matters was pruned"
    torch.testing.assert_close(found, want, rtol=0, atol=2e-5 * largest)  # float32 sums in another order
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    kept_tiles = weights[key].unflatten(1, (4, 32))[:, plan.keep["ffn"][1]]
    assert torch.equal(read_tensors(Path("student"), key)[key], kept_tiles.flatten(1))


def check_criterion() -> None:
    """The scores match the dense formula. test_importance.py splits the sequence of a maximum itself."""
    import pytest

    chosen = ["tests/ranks/test_importance.py", "tests/unit/test_tables.py"]
    assert pytest.main(["-q", *chosen, "-k", "(plain and max) or aggregations"]) == 0


def check_loss() -> None:
    """Value and gradients of the new divergence match a dense float64 computation, on one rank."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from minitron_mp.config.distillation import DistillConfig
    from minitron_mp.losses.fused import distillation_loss
    from minitron_mp.losses.objective import Objective, TeacherLogits

    name = DistillConfig(divergence="hellinger").divergence
    torch.manual_seed(0)
    s, b, h, columns, vocab_size, temperature = 5, 2, 8, 48, 41, 2.0
    hidden = torch.randn(s, b, h, requires_grad=True)
    weight = torch.randn(columns, h, requires_grad=True)
    teacher = 3 * torch.randn(s, b, columns)
    labels, token_weights = torch.randint(vocab_size, (s, b)), torch.rand(s, b)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    loss, _ = distillation_loss(
        hidden,
        weight,
        labels,
        token_weights,
        TeacherLogits(teacher),
        Objective(name, temperature, ce_weight=0.5),
        vocab_size=vocab_size,
        group=dist.group.WORLD,
    )
    loss.backward()

    dense_hidden, dense_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = dense_hidden @ dense_weight[:vocab_size].T
    q = F.softmax(logits / temperature, -1)
    p = F.softmax(teacher[..., :vocab_size].double() / temperature, -1)
    divergence = 2 - 2 * (p * q).sqrt().sum(-1)
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(s, b)
    dense_loss = ((temperature**2 * divergence + 0.5 * ce) * token_weights).sum()
    dense_loss.backward()
    # float32 against float64: sums of 41 terms
    torch.testing.assert_close(loss.double(), dense_loss, rtol=1e-6, atol=0)
    for ours, dense in ((hidden, dense_hidden), (weight, dense_weight)):
        torch.testing.assert_close(ours.grad.double(), dense.grad, rtol=1e-5, atol=1e-6)
    if importlib.util.find_spec("triton"):
        _check_kernels(name)


def _check_kernels(divergence: str) -> None:
    """The Triton kernels, run by Triton's interpreter, match the formulas in plain torch."""
    import torch

    from minitron_mp.losses import kernel_calls, torch_rows
    from minitron_mp.losses.objective import Objective
    from minitron_mp.losses.rows import LogitRows

    # Two blocks of columns, the second one short.
    n, columns, valid = 3, 2100, 2077
    student, teacher = 3 * torch.randn(2, n, columns)
    objective = Objective(divergence, temperature=2.0, ce_weight=0.5)
    labels = torch.tensor([0, 7, valid - 1])
    rows = LogitRows(student, teacher, labels, torch.rand(n), valid, objective)
    found = []
    for functions in (torch_rows, kernel_calls):
        own = functions.statistics(rows)
        losses, gradient = torch.empty(3, n), torch.empty_like(student)
        functions.finish(rows, own, own.table[None], None, losses, gradient)
        found.append((own.table, losses, gradient))
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def check_stage() -> None:
    """The new stage is a command, counts every token, is skipped when done, and is optional."""
    import pytest
    from tiny import make_model, make_recipe_file, make_text

    model, text = make_model(Path("model")), make_text(Path("text"))
    recipe = make_recipe_file(Path("recipe.yaml"), model, text, Path("out"), data={"count_tokens": True})
    assert "token-counts" in _minitron("--help")
    for stage in ("import", "data", "token-counts"):
        printed = _minitron(stage, recipe)
    counts = json.loads(Path("out/token_counts.json").read_text())["counts"]
    assert len(counts) == 300
    assert f"{sum(counts):,} tokens use" in printed
    assert sum(counts) == Path("out/data/train.bin").stat().st_size // 2  # ids of two bytes
    assert "token-counts: done" in _minitron("token-counts", recipe)
    assert pytest.main(["-q", "tests/unit/test_stages.py"]) == 0
    needed = "the recipe has no stage token-counts; add data.count_tokens: true"
    assert needed in _minitron("token-counts", recipe, "data.count_tokens=false", code=2)


def _minitron(*words: str | Path, code: int = 0) -> str:
    """Run the command line in this process and return what it prints."""
    from minitron_mp.cli import main

    printed, exit_code = io.StringIO(), None
    with (
        mock.patch.object(sys, "argv", ["minitron-mp", *map(str, words)]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            main()
        except SystemExit as end:
            exit_code = end.code
    assert (exit_code or 0) == code, printed.getvalue()
    return printed.getvalue()


CHECKS = {
    "family": check_family,
    "axis": check_axis,
    "criterion": check_criterion,
    "loss": check_loss,
    "stage": check_stage,
}

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    CHECKS[sys.argv[1]]()
