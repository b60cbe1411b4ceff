"""Any task of EleutherAI's lm-evaluation-harness on the sharded model of a recipe.

All ranks of the job run the harness in the same order: it builds the same requests on each, our scoring shares them out over data
parallel ranks (spans.py), and every rank gets every answer. So the harness takes each rank for its only one; rank 0 prints and writes.

Texts are split, cut and joined as the harness does for its own Hugging Face models (lm_eval/models/huggingface.py, 0.4.13): the
tokenizer's own rule for special tokens; context and continuation encoded together, the continuation being what lies behind as many
tokens as the context alone has; too long requests cut from the left to max_length + 1 tokens, of which the last one is only asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minitron_mp import __version__
from minitron_mp.artifacts.checkpoint import load_weights
from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import Manifest, require_artifact
from minitron_mp.config.recipe import Recipe
from minitron_mp.console import Tracker, say, speaks, table
from minitron_mp.data.tokenizer import load_hugging_face
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.distributed.world import join_world
from minitron_mp.errors import InputError, refuse
from minitron_mp.evaluation.log_likelihood import Row, next_tokens, num_groups, score_rows
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import build_model
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.report.tables import HARNESS, harness_rows
from minitron_mp.training.teacher_correction import PREFIX
from minitron_mp.workflow.context import ASSETS
from minitron_mp.workflow.graph import StageGraph

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
except ImportError as error:
    raise InputError(
        f"lm-evaluation-harness is not here ({error}); run `pip install minitron-mp[eval]`"
    ) from error

GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
"""What a task may say of its generation. Without sampling temperature, top_p and top_k say nothing."""

KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "n-samples",
    "n-shot",
    "versions",
    "higher_is_better",
    "configs",
    "lm_eval_version",
    "transformers_version",
)
"""What of the harness's results is written."""


class ShardedLM(TemplateLM):
    """The harness's view of a sharded model. tokenizer: of transformers.

    Its methods are reached by all ranks with the same requests and return the same on each. cut: requests that lost their beginning.
    """

    def __init__(
        self,
        model: ShardedModel,
        tokenizer: Any,
        *,
        max_length: int,
        micro_batch_size: int,
    ):
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise InputError("the harness needs a tokenizer with an end-of-sequence token; set eos_token")
        self.sharded_model, self.tokenizer = model, tokenizer
        self.max_length, self.micro_batch_size = max_length, micro_batch_size
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        how = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self.tokenizer.encode(
            string, **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens})
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log p of the continuation in nats, whether each of its tokens is the most likely one) of each request (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """log p of each whole text in nats, in windows of max_length that see as much of what is before as fits."""
        windows = []
        for number, (text,) in enumerate(request.args for request in requests):
            places = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
            windows += [
                (number, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(self.tok_encode(text), **places)
            ]
        totals = [0.0] * len(requests)
        for (number, *_), (log_p, _) in zip(
            windows, self._loglikelihood_tokens([("", *pair) for _, *pair in windows])
        ):
            totals[number] += log_p
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        _same_on_all(rows)
        if not rows:
            return []
        with Tracker(
            "harness: loglikelihood",
            num_groups(len(rows), self.sharded_model.world, self.micro_batch_size),
            "batches",
        ) as tracker:
            scores = score_rows(
                self.sharded_model,
                rows,
                micro_batch_size=self.micro_batch_size,
                eod=self.eot_token_id,
                progress=lambda: tracker.advance(1),
            )
        return [(log_p, missed == 0) for log_p, missed in scores.tolist()]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not continuation:
            raise InputError(
                "a request of this task has a continuation without a token of its own behind its context; the harness cannot score it"
            )
        if len(continuation) > self.max_length:
            raise InputError(
                f"a request of this task asks for {len(continuation)} tokens, the model is given {self.max_length}; raise --max-length"
            )
        cut = max(0, len(context) + len(continuation) - self.max_length - 1)
        self.cut += cut > 0
        return Row((context + continuation)[cut:], len(context) - cut)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context by greedy decoding, up to a stop string, an end of text or max_gen_toks.

        Without a cache of keys and values: each new token is a forward pass over its whole text, so n tokens behind a context of c
        take n (c + n/2) token forwards, about c + n/2 times what a cache would. All requests grow together, in batches of
        micro_batch_size a data parallel rank. InputError for sampling and beams.
        """
        plans = [self._generation(*request.args) for request in requests]
        _same_on_all(plans)
        made: list[list[int]] = [[] for _ in requests]
        texts = [""] * len(requests)
        active = [i for i, (_, _, limit) in enumerate(plans) if limit > 0]
        with Tracker("harness: generate_until", len(active), "requests") as tracker:
            while active:
                found = next_tokens(
                    self.sharded_model,
                    [plans[i][0] + made[i] for i in active],
                    micro_batch_size=self.micro_batch_size,
                    eod=self.eot_token_id,
                )
                for i, token in zip(active, found):
                    made[i].append(token)
                    texts[i] = self.tokenizer.decode(made[i], skip_special_tokens=True)
                going = [i for i in active if not self._ended(made[i], texts[i], *plans[i][1:])]
                tracker.advance(len(active) - len(going))
                active = going
        return [postprocess_generated_text(text, stops, None) for text, (_, stops, _) in zip(texts, plans)]

    def _generation(self, context: str, settings: dict[str, Any]) -> tuple[list[int], list[str], int]:
        """(tokens of the context, stop strings, largest number of new tokens)."""
        how: dict[str, Any] = dict(
            normalize_gen_kwargs(settings, default_max_gen_toks=256)
        )  # as the harness's own models
        if how["do_sample"] or how.get("num_beams", 1) != 1:
            raise InputError(
                f"this task wants sampling or beams ({settings}), here is greedy decoding; set do_sample: false in a copy of the task"
            )
        if unknown := sorted(how.keys() - GENERATION):
            raise InputError(
                f"this task wants {', '.join(unknown)} of its generation, which greedy decoding here does not have; known: {sorted(GENERATION)}"
            )
        room = self.max_length - how["max_gen_toks"]
        if room < 1:
            raise InputError(
                f"{how['max_gen_toks']} new tokens leave no room for a context in {self.max_length}; raise --max-length"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(tokens) > room
        return (
            tokens[-room:],
            handle_stop_sequences(how["until"], eos=self.tokenizer.decode(self.eot_token_id)),
            how["max_gen_toks"],
        )

    def _ended(self, made: list[int], text: str, stops: list[str], limit: int) -> bool:
        return (
            made[-1] == self.eot_token_id or len(made) == limit or any(stop in text for stop in stops if stop)
        )


def _same_on_all(requests: list[Any]) -> None:
    """InputError unless every rank has rank 0's requests: what ranks find for a request's number is added up."""
    digest = hashlib.sha256(repr(requests).encode()).hexdigest()
    first = on_rank_0(lambda: digest)
    raise_on_all_ranks(
        None
        if digest == first
        else InputError(
            "the harness has made other requests here than on rank 0; give all nodes the same tasks and data"
        )
    )


def run_harness(
    recipe: Recipe,
    tasks: Sequence[str],
    *,
    model: str = "distilled",
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    max_length: int | None = None,
    chat_template: bool = False,
) -> Path:
    """Run tasks of the harness on a model of a recipe and write harness_<model>_<hash of the settings>.json; its path. Reached by all ranks of the job.

    tasks: names, groups, or patterns. limit: the first so many items of each task. include_path: folder with more tasks; where it has all
    that are asked for, the harness's own are not read. max_length: tokens that the model is given at most; default data.sequence_length.
    """
    from lm_eval.evaluator import (
        simple_evaluate,
    )  # not above: reads the package `datasets`, which takes seconds

    project = StageGraph(recipe)
    with join_world(recipe.parallel, seed=recipe.seed) as ranks, _quiet():
        path, arch, made_from, prefix = on_rank_0(lambda: _model(project, model))
        length = max_length or recipe.data.sequence_length
        if length > arch.max_position_embeddings:
            raise InputError(
                f"--max-length {length} is above the model's max_position_embeddings {arch.max_position_embeddings}"
            )
        tokenizer = load_hugging_face(
            Path(recipe.data.tokenizer or project.paths["import"] / ASSETS), arch.vocab_size
        )
        if chat_template and not tokenizer.chat_template:
            raise InputError("--apply-chat-template: the tokenizer has no chat template; drop it")
        manager, names = _find(tasks, include_path)
        on_rank_0(
            lambda: _load(manager, names), takes_long=True
        )  # so that one rank fetches what the others then find
        precision = recipe.teacher_precision if model == "teacher" else recipe.precision
        sharded = build_model(
            arch, ranks, precision=precision, sequence_length=length, transformer_impl=recipe.transformer_impl
        )
        load_weights(sharded.chunks, path, ranks, prefix)
        lm = ShardedLM(
            sharded,
            tokenizer,
            max_length=length,
            micro_batch_size=recipe.evaluate.micro_batch_size,
        )
        options = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": chat_template,
            "log_samples": False,
        }
        draws = (
            100_000 if ranks.is_main else 0
        )  # of standard errors by resampling, in processes of their own; the harness's default
        results = simple_evaluate(lm, tasks=names, task_manager=manager, **options, bootstrap_iters=draws)
        settings = {
            "model": model,
            "tasks": names,
            "limit": limit,
            "num_fewshot": num_fewshot,
            "max_length": length,
            "chat_template": chat_template,
        }
        manifest = Manifest(
            stage="harness",
            settings=settings,
            inputs=made_from,
            arch=arch,
            made_by=f"minitron_mp {__version__}",
        )
        output = recipe.root / f"harness_{model}_{manifest.fingerprint[:8]}.json"
        on_rank_0(lambda: _write(output, manifest, results, lm.cut))
    return output


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness and what it calls print on rank 0 only."""
    with contextlib.ExitStack() as stack:
        if not speaks():
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
            stack.enter_context(contextlib.redirect_stderr(sink))
        yield


def _model(project: StageGraph, model: str) -> tuple[Path, Arch, dict[str, str], str]:
    """Checkpoint, architecture, stage -> fingerprint, and prefix of the keys of a model, named as in evaluation.json; InputError unless it is this recipe's."""
    recipe = project.recipe
    learned = (
        model == "teacher" and recipe.corrects_during_distillation
    )  # it lies beside the student that heard it
    stages = {
        "teacher": "distill" if learned else recipe.distillation_teacher,
        "pruned": "prune",
        "distilled": "distill",
    }
    stages |= {"uncorrected": "import"} if recipe.correct else {}
    stages |= {"unpruned": recipe.pruning_base} if recipe.distillation_teacher != recipe.pruning_base else {}
    if model not in stages:
        raise InputError(f"--model {model}: this recipe has {', '.join(stages)}")
    for stage in ("import", stages[model]):  # the tokenizer lies in the first
        found = require_artifact(project.paths[stage], stage, project.manifest(stage))
    arch = (
        require_artifact(project.paths[recipe.distillation_teacher], recipe.distillation_teacher).arch
        if learned
        else found.arch
    )
    assert arch is not None
    return project.paths[stages[model]], arch, {stages[model]: found.fingerprint}, PREFIX if learned else ""


def _find(tasks: Sequence[str], include_path: Path | None) -> tuple[Any, list[str]]:
    """The harness's task manager, and the names that are meant."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path: there is no folder {include_path}")
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=False)
    if not all(map(manager.match_tasks, ([name] for name in tasks))):
        manager = TaskManager(
            include_path=include_path and str(include_path)
        )  # reads some ten thousand files
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    refuse("the harness has no task of this name (`lm-eval ls tasks` lists its own):", unknown)
    return manager, manager.match_tasks(list(tasks))


def _load(manager: Any, names: list[str]) -> None:
    try:
        manager.load(names)
    except Exception as error:  # whatever a task's file, its data set or the network raise
        raise InputError(
            f"the tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _write(path: Path, manifest: Manifest, results: dict[str, Any], cut: int) -> None:
    found = {
        "manifest": manifest.model_dump(mode="json"),
        "cut_requests": cut,
        **{name: results[name] for name in KEPT if name in results},
    }
    write_text(path, json.dumps(found, indent=1, default=handle_non_serializable))
    table(
        f"{manifest.settings['model']}: lm-evaluation-harness {results['lm_eval_version']}",
        HARNESS,
        harness_rows(results),
    )
    if cut:
        say(
            f"{cut} requests were longer than {manifest.settings['max_length']} tokens and lost their beginning; --max-length gives them more"
        )
    say(f"harness: {path}; `minitron-mp report` takes it into a finished report")
