"""A complete small project: model folder with tokenizer, text, recipe, and the command line."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from minitron_mp import load_recipe
from minitron_mp.training.throughput import Throughput
from minitron_mp.workflow import stages
from minitron_mp.workflow.graph import StageGraph

ROOT = Path(__file__).parents[2]
STAGES = {stage.name: stage for stage in stages.STAGES if not stage.requirement}
"""The stages of every recipe."""
REQUIREMENTS = {stage.name: stage.requirement for stage in stages.STAGES if stage.requirement}
"""What adds each of the other stages to a recipe."""
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""Of a model that cuts on each axis and still divides by two tensor parallel ranks."""
STEPS, CHECKPOINT_INTERVAL, MAX_LR = 30, 6, 5e-3
OUTPUT = [
    ".text_hashes.json",
    "data",
    "evaluation.json",
    "finished",
    "importance.safetensors",
    "metrics.jsonl",
    "plan.json",
    "report.html",
    "report.md",
    "resolved_recipe.yaml",
]
OUTPUT += ["stages.jsonl", "student", "student_distilled", "student_hf", "teacher", "tensorboard"]
"""Names in the output folder of a finished project, in order."""
TWO_RANKS = ("parallel.tp=2", "parallel.sequence_parallel=true")
REMOTE = ("teacher.placement=remote", "teacher.window=2")


@dataclass(frozen=True)
class Run:
    """A project on disk, and how the command that made it ended."""

    recipe: Path
    output: Path
    done: subprocess.CompletedProcess | None = None

    def project(self, *overrides: str) -> StageGraph:
        return StageGraph(load_recipe(self.recipe, overrides))

    def to_repeat(self, *overrides: str) -> dict[str, list[str]]:
        """Stages that are not done, and why."""
        project = self.project(*overrides)
        return {name: why for name in STAGES if (why := project.why_not_done(name)) is not None}

    def state(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of each file of an artifact."""
        files = (
            path
            for stage in STAGES.values()
            for path in [self.output / stage.artifact, *(self.output / stage.artifact).rglob("*")]
        )
        return {
            str(path.relative_to(self.output)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in files
            if path.is_file()
        }


def make_model(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Write a random float32 Llama with tied embeddings and a byte-level tokenizer.

    Returns the folder.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    vocab_size = make_tokenizer(folder)
    common = {
        "vocab_size": vocab_size,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**common, **SIZES, **sizes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.2)
    model.save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path, vocab_size: int = 300) -> int:
    """Write a tokenizer of the 256 bytes, some pairs of them and an end of text.

    Returns its number of tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(sentences(200), trainer)
    PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>").save_pretrained(folder)
    return fast.get_vocab_size()


def sentences(count: int, seed: int = 0) -> list[str]:
    words = [
        "prune",
        "score",
        "layer",
        "head",
        "neuron",
        "channel",
        "teacher",
        "student",
        "token",
        "keep",
        "cut",
        "rank",
        "loss",
        "the",
        "a",
        "and",
    ]
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=chance.randint(6, 20))) + ".\n" for _ in range(count)]


def make_text(folder: Path, num_files: int = 60) -> Path:
    """Files enough that each part of the split gets some."""
    folder.mkdir(parents=True)
    for number in range(num_files):
        (folder / f"{number:02}.txt").write_text("".join(sentences(12, seed=number + 1)))
    return folder


def make_recipe_file(path: Path, model: Path, text: Path, output: Path, **sections: Any) -> Path:
    """A recipe of seconds: float32, every axis is cut."""
    values = {
        "model": str(model),
        "output": str(output),
        "precision": "fp32",
        "data": {"source": str(text), "sequence_length": 32, "valid_fraction": 0.15},
        "score": {"num_samples": 16, "micro_batch_size": 4},
        "target": {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6},
        "distill": {
            "steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "lr": MAX_LR,
            "min_lr": MAX_LR / 10,
            "warmup_steps": 4,
            "checkpoint_interval": CHECKPOINT_INTERVAL,
        },
        "evaluate": {"num_samples": 16, "micro_batch_size": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(values))
    return path


def command(*words: str | Path, ranks: int = 1) -> list[str]:
    """python -m minitron_mp, under torchrun for more than one rank."""
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    return [sys.executable, *torchrun, "-m", "minitron_mp", *map(str, words)]


def environment() -> dict[str, str]:
    """Return a user's environment with one thread per rank.

    It has none of the variables that a launcher or an earlier test in this process has set.
    """
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "COLUMNS": "160",
        "NO_COLOR": "1",
    }


def minitron(*words: str | Path, ranks: int = 1, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*words, ranks=ranks),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def drop(output: Path, *stages: str) -> None:
    """Delete the artifacts of stages."""
    for name in stages:
        path = output / STAGES[name].artifact
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def names(folder: Path) -> list[str]:
    """Return the names in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


def read_metrics(output: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clock = {"time", "step_time_s", "tokens_per_s"} | {field.name for field in fields(Throughput)}
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


def loss_curve(run: Run) -> dict[int, float]:
    """Step -> loss, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.output / "tensorboard" / "distill"))
    board.Reload()
    points = board.Scalars("distill/loss")
    assert len({point.step for point in points}) == len(points)
    return {point.step: point.value for point in points}


def refused(done: tuple[int, str, str], *words: str) -> None:
    """Assert that a command (exit code, output, error output) reports an input error.

    The message must contain `words`, and there must be no traceback.
    """
    code, out, err = done
    assert code == 2, done
    assert "Traceback" not in out + err
    assert err.startswith("error: "), err
    for word in words:
        assert word in err, err
