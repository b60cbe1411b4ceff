"""The model interface of lm-evaluation-harness on a sharded model.

All ranks of the job run the harness in the same order, and it builds the same requests on each
rank. evaluation/log_likelihood.py distributes them over data-parallel ranks and returns all results
on every rank. So the harness runs on each rank as in a job of one rank.

Texts are split, truncated and joined as in the Hugging Face models of the harness
(lm_eval/models/huggingface.py, 0.4.13). The tokenizer adds its special tokens. Context and
continuation are encoded together. The continuation starts after n tokens, where n is the number of
tokens of the context without it. The left side of a long request is cut off, so that max_length + 1
tokens remain. The last of them is only predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from minitron_mp.console import Tracker
from minitron_mp.distributed.sync import on_rank_0, raise_on_all_ranks
from minitron_mp.errors import InputError
from minitron_mp.evaluation.log_likelihood import Row, next_tokens, num_groups, score_rows
from minitron_mp.models.sharded_model import ShardedModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise InputError(
        f"lm-evaluation-harness cannot be imported ({error}); run `pip install minitron-mp[eval]`"
    ) from error

GENERATION_SETTINGS = {
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
}
"""Settings that a task may give. Greedy decoding ignores temperature, top_p and top_k."""

DEFAULT_NEW_TOKENS = 256
"""Number of new tokens of a generation without max_gen_toks, as in the models of the harness."""


class TokenRequest(NamedTuple):
    """A log-likelihood request of the harness: a key, and tokens of context and continuation."""

    key: Any
    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Generation:
    """A request for greedy decoding."""

    context: list[int]
    stops: list[str]
    max_new_tokens: int


class ShardedLM(TemplateLM):
    """A sharded model as a language model of the harness. tokenizer: of transformers.

    All ranks call the methods with the same requests and receive the same results. The attribute
    num_truncated counts requests whose beginning was cut off.
    """

    def __init__(self, model: ShardedModel, tokenizer: Any, *, max_length: int, micro_batch_size: int):
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has no end-of-sequence token, which the harness needs; set its eos_token"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.micro_batch_size = micro_batch_size
        self.num_truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the token before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        if add_special_tokens is None:
            ids = self.tokenizer.encode(string)
        else:
            ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        num_embeddings = self.model.arch.vocab_size
        if ids and max(ids) >= num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"a text of this task has the token {token!r} with id {max(ids)}, but the model's embedding "
                f"has {num_embeddings} rows; use a different task, or set data.tokenizer"
            )
        return ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log p of the continuation in nats, whether it is greedy) of each request.

        A request is (context, continuation).
        """
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return log p of each text in nats.

        A text is split into windows of max_length. The context of a window is the text before it,
        up to the length limit.
        """
        windows = []
        numbers = []
        for number, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                context, continuation = make_disjoint_window(pair)
                windows.append(TokenRequest("", context, continuation))
                numbers.append(number)
        totals = [0.0] * len(requests)
        for number, (log_p, _) in zip(numbers, self._loglikelihood_tokens(windows)):
            totals[number] += log_p
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        _require_same_on_all_ranks(rows)
        if not rows:
            return []
        batches = num_groups(len(rows), self.model.world, self.micro_batch_size)
        with Tracker("harness: loglikelihood", batches, "batches") as tracker:
            scores = score_rows(
                self.model,
                rows,
                micro_batch_size=self.micro_batch_size,
                eod=self.eot_token_id,
                progress=lambda: tracker.advance(1),
            )
        return [(log_p, num_misses == 0) for log_p, num_misses in scores.tolist()]

    def _row(self, context: list[int], continuation: list[int]) -> Row:
        if not continuation:
            raise InputError(
                "a request of this task has a continuation that adds no token to its context, so the harness "
                "cannot score it; correct the task"
            )
        if len(continuation) > self.max_length:
            raise InputError(
                f"a request of this task has a continuation of {len(continuation)} tokens; the model "
                f"accepts {self.max_length}: raise --max-length"
            )
        excess = max(0, len(context) + len(continuation) - self.max_length - 1)
        if excess:
            self.num_truncated += 1
        return Row((context + continuation)[excess:], len(context) - excess)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the greedy continuation of each context.

        It ends at a stop string, at the end of text, or after max_gen_toks. There is no key-value
        cache: each new token needs a forward pass over the full text, so n tokens after a context
        of c tokens take n (c + n/2) token forwards, about c + n/2 times the number with a cache.
        All requests grow together, in batches of micro_batch_size per data-parallel rank.
        InputError for sampling and beams.
        """
        plans = [self._generation(*request.args) for request in requests]
        _require_same_on_all_ranks(plans)
        new_tokens: list[list[int]] = [[] for _ in requests]
        texts = [""] * len(requests)
        active = [i for i, plan in enumerate(plans) if plan.max_new_tokens > 0]
        with Tracker("harness: generate_until", len(active), "requests") as tracker:
            while active:
                tokens = next_tokens(
                    self.model,
                    [plans[i].context + new_tokens[i] for i in active],
                    micro_batch_size=self.micro_batch_size,
                    eod=self.eot_token_id,
                )
                for i, token in zip(active, tokens):
                    new_tokens[i].append(token)
                    texts[i] = self.tokenizer.decode(new_tokens[i], skip_special_tokens=True)
                remaining = [i for i in active if not self._is_finished(new_tokens[i], texts[i], plans[i])]
                tracker.advance(len(active) - len(remaining))
                active = remaining
        return [postprocess_generated_text(text, plan.stops, None) for text, plan in zip(texts, plans)]

    def _generation(self, context: str, settings: dict[str, object]) -> Generation:
        values: dict[str, Any] = dict(normalize_gen_kwargs(settings, default_max_gen_toks=DEFAULT_NEW_TOKENS))
        if values["do_sample"] or values.get("num_beams", 1) != 1:
            raise InputError(
                f"this task needs sampling or beams ({settings}); only greedy decoding is supported: "
                "set do_sample: false in a copy of the task"
            )
        unknown = sorted(values.keys() - GENERATION_SETTINGS)
        if unknown:
            raise InputError(
                f"this task sets {', '.join(unknown)} for its generation; supported: "
                f"{', '.join(sorted(GENERATION_SETTINGS))}. Remove the setting in a copy of the task"
            )
        room = self.max_length - values["max_gen_toks"]
        if room < 1:
            raise InputError(
                f"{values['max_gen_toks']} new tokens leave no room for a context in {self.max_length}; "
                "raise --max-length"
            )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > room:
            self.num_truncated += 1
        stops = handle_stop_sequences(values["until"], eos=self.tokenizer.decode(self.eot_token_id))
        return Generation(tokens[-room:], stops, values["max_gen_toks"])

    def _is_finished(self, tokens: list[int], text: str, plan: Generation) -> bool:
        if tokens[-1] == self.eot_token_id or len(tokens) == plan.max_new_tokens:
            return True
        return any(stop in text for stop in plan.stops if stop)


def _require_same_on_all_ranks(requests: Sequence[object]) -> None:
    """Raise InputError unless every rank has rank 0's requests.

    Results are summed by request number.
    """
    digest = hashlib.sha256(repr(requests).encode()).hexdigest()
    digest_of_rank_0 = on_rank_0(lambda: digest)
    problem = None
    if digest != digest_of_rank_0:
        problem = InputError(
            "the requests of the harness differ between this rank and rank 0; give all nodes the same tasks "
            "and data"
        )
    raise_on_all_ranks(problem)
