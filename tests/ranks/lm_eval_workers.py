"""Worker functions for test_lm_eval.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import project_workers
import torch.distributed as dist
from cases import Layout
from model_workers import joined, load

from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.models.sharded_model import ShardedModel


def ask(
    layout: Layout,
    arch: Arch,
    teacher: Path,
    folder: Path,
    max_length: int,
    pairs: list[tuple[str, str]],
    texts: list[str],
    prompts: list[Any],
    eos: str,
) -> dict[str, Any]:
    """Return the adapter's answers to each kind of request.

    The first prompt is requested again with another token as the end of text.
    """
    from transformers import AutoTokenizer

    from minitron_mp.integrations.lm_eval.sharded_lm import ShardedLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with joined(layout) as world:
        lm = ShardedLM(
            load(arch, teacher, world),
            tokenizer,
            max_length=max_length,
            micro_batch_size=4,
        )
        found = {
            "pairs": lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs]),
            "texts": lm.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts]),
            "prompts": lm.generate_until([SimpleNamespace(args=prompt) for prompt in prompts]),
            "cut": lm.num_truncated,
        }
        tokenizer.eos_token = eos
        return found | {"prompt until eos": lm.generate_until([SimpleNamespace(args=prompts[0])])}


def refusals(arch: Arch, folder: Path, settings: list[dict[str, Any]]) -> list[str]:
    """What the adapter says of requests that it cannot serve; no model is there to be asked."""
    from transformers import AutoTokenizer

    from minitron_mp.integrations.lm_eval.sharded_lm import ShardedLM

    said = []
    with joined(Layout("one", 1)) as world:
        lm = ShardedLM(
            ShardedModel([], arch, world, 8, "fp32"),
            AutoTokenizer.from_pretrained(folder),
            max_length=8,
            micro_batch_size=1,
        )
        calls = [(lm.generate_until, ("a", how)) for how in settings] + [
            (lm.loglikelihood, ("a", "b c d e f g h i j k l m")),
            (lm.loglikelihood, ("a", "")),
        ]
        for method, request in calls:
            try:
                method([SimpleNamespace(args=request)])
                said.append("nothing")
            except InputError as error:
                said.append(str(error))
    return said


def disagree(layout: Layout, arch: Arch, folder: Path) -> str:
    """What the adapter says when ranks are asked unlike things."""
    from transformers import AutoTokenizer

    from minitron_mp.integrations.lm_eval.sharded_lm import ShardedLM

    with joined(layout) as world:
        lm = ShardedLM(
            ShardedModel([], arch, world, 8, "fp32"),
            AutoTokenizer.from_pretrained(folder),
            max_length=8,
            micro_batch_size=1,
        )
        try:
            lm.loglikelihood([SimpleNamespace(args=("a", " bc"[: 2 + world.rank]))])
        except InputError as error:
            return str(error)
    return "nothing"


def command(
    arguments: list[str], task: Path, layout: Layout, micro_batch_size: int
) -> tuple[Any, float, float]:
    """Run the command line as one rank of torchrun.

    Also returns accuracy and normalised accuracy of the same items as our own choice tasks.
    """
    from minitron_mp.data.tokenizer import load_tokenizer
    from minitron_mp.evaluation.choice_tasks import score_task
    from minitron_mp.evaluation.task_files import read_task_file
    from minitron_mp.models.hf_config import read_arch

    inventory = "torch.utils.collect_env.get_pretty_env_info"  # of the machine, by pip and others: seconds
    with patch.dict(os.environ, RANK=str(dist.get_rank())), patch(inventory, lambda: ""):
        done = project_workers.minitron(arguments=arguments)
    recipe = Path(arguments[1]).parent
    arch = read_arch(recipe / "model")
    with joined(layout) as world:
        model = replace(load(arch, recipe / "out" / "teacher", world), sequence_length=32)
        own = score_task(
            {"teacher": model},
            read_task_file(task),
            load_tokenizer(recipe / "model"),
            micro_batch_size=micro_batch_size,
        )["teacher"]
    return done, own.accuracy, own.normalised
