"""The same distillation in plain transformers: AutoModelForCausalLM, AdamW, KL from log_softmax.

It has the same student and teacher weights, samples, order, batch, learning rates, weight decay and
clipping as the library's run. In bf16 it trains float32 weights under autocast with a bf16 teacher.
The library trains bf16 weights with float32 main weights in its optimizer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minitron_mp.artifacts.files import ASSETS
from minitron_mp.artifacts.hf_folder import read_tensors
from minitron_mp.artifacts.manifest import require_artifact
from minitron_mp.config.distillation import DistillConfig
from minitron_mp.console import Tracker
from minitron_mp.data.batches import Corpus, microbatches, open_samples
from minitron_mp.data.tokenizer import load_tokenizer
from minitron_mp.distributed.world import World, join_world
from minitron_mp.models.families.export import exportable_arch
from minitron_mp.models.hf_writer import write_folder
from minitron_mp.models.sharded_model import DTYPES
from minitron_mp.workflow.graph import StageGraph


class PlainLoop:
    """A student and a teacher of transformers on one device, with a fused AdamW."""

    def __init__(self, student: Any, teacher: Any, settings: DistillConfig, precision: str):
        assert settings.divergence == "forward_kl"
        assert settings.temperature == 1.0
        self.student = student.train()
        self.teacher = teacher.eval()
        self.settings = settings
        self.precision = precision
        self.device = next(student.parameters()).device
        self.optimizer = torch.optim.AdamW(
            groups(student, settings.weight_decay),
            betas=(settings.adam_beta1, settings.adam_beta2),
            fused=True,
        )

    def losses(self, sample: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means of KL(teacher || student) and of cross-entropy over a microbatch.

        A term with weight 0 has no gradient.
        """
        tokens, labels = sample["tokens"].to(self.device), sample["labels"].to(self.device)
        with torch.no_grad():
            log_p = F.log_softmax(self.teacher(tokens).logits.float(), -1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            z = self.student(tokens).logits
        log_q = F.log_softmax(z.float(), -1)
        of_kl, of_ce = (
            log_q if weight else log_q.detach()
            for weight in (self.settings.kl_weight, self.settings.ce_weight)
        )
        kl = F.kl_div(of_kl, log_p, log_target=True, reduction="none").sum(-1).mean()
        return kl, F.nll_loss(of_ce.flatten(0, 1), labels.flatten())

    def step(self, step: int, samples: list[dict[str, torch.Tensor]]) -> list[float]:
        """Make optimizer step `step`, from 0; return the batch means of KL and cross-entropy."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        total = torch.zeros(2, device=self.device)
        for sample in samples:
            kl, ce = self.losses(sample)
            ((settings.kl_weight * kl + settings.ce_weight * ce) / len(samples)).backward()
            total += torch.stack([kl.detach(), ce.detach()]) / len(samples)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), settings.clip_grad or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.tolist()


def train_plain(project: StageGraph, folder: Path) -> dict[str, Any]:
    """Train, and return loss and KL on the held-out samples of `evaluate`, and the training curve.

    folder: receives the exported models.
    """
    from transformers import AutoModelForCausalLM

    recipe, settings = project.recipe, project.recipe.distill
    with join_world(recipe.parallel, seed=recipe.seed) as world:
        for stage in ("prune", recipe.distillation_teacher):
            write_hf(project, stage, folder / stage, world)
        parts = {
            "train": (settings.steps * settings.global_batch_size, True),
            "valid": (recipe.evaluate.num_samples, False),
        }
        tokenizer = load_tokenizer(recipe.data.tokenizer or project.paths["import"] / ASSETS)
        length = recipe.data.sequence_length
        corpus = Corpus(project.paths["data"], tokenizer, length, recipe.seed)
        train, valid = (open_samples(corpus, part, n, repeat=repeat) for part, (n, repeat) in parts.items())
        device = world.device
    student = AutoModelForCausalLM.from_pretrained(folder / "prune", dtype=torch.float32).to(device)
    teacher = AutoModelForCausalLM.from_pretrained(
        folder / recipe.distillation_teacher, dtype=DTYPES[recipe.teacher_precision]
    ).to(device)
    loop, curve = PlainLoop(student, teacher, settings, recipe.precision), []
    tokens_per_step = settings.global_batch_size * length
    with Tracker("plain loop", settings.steps, "steps") as tracker:
        for step in range(settings.steps):
            samples = batches(train, step, settings.global_batch_size, settings.micro_batch_size)
            kl, ce = loop.step(step, samples)
            curve.append([(step + 1) * tokens_per_step, kl, ce])
            tracker.advance(1, f"KL {kl:.4f}")
    student.eval()
    with torch.no_grad():
        held_out = [loop.losses(batches(valid, i, 1, 1)[0]) for i in range(recipe.evaluate.num_samples)]
    kl, loss = (torch.stack(column).double().mean().item() for column in zip(*held_out))
    return {"loss": loss, "kl": kl, "curve": curve}


def learning_rate(settings: DistillConfig, step: int) -> float:
    """Return the learning rate of a step from 0: linear warm-up, then cosine from lr to min_lr."""
    done = step + 1
    if done <= settings.warmup_steps:
        return settings.lr * done / settings.warmup_steps
    share = (done - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * share)) / 2


def groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups; vectors (norms, biases) have no weight decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def batches(
    dataset: Any, step: int, global_batch_size: int, micro_batch_size: int
) -> list[dict[str, torch.Tensor]]:
    sizes = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    return microbatches(dataset, step, **sizes, dp_rank=0, dp_size=1)


def write_hf(project: StageGraph, stage: str, folder: Path, world: World) -> None:
    """Write the model of a stage as a Hugging Face folder."""
    arch = require_artifact(project.paths[stage], stage).arch
    assert arch is not None
    tensors = read_tensors(project.paths[stage], arch)
    family = project.recipe.export.family if stage == "prune" else None
    write_folder(
        folder,
        project.paths["import"] / ASSETS,
        exportable_arch(arch, family),
        DTYPES[project.recipe.precision],
        tensors,
    )
