"""Microbatches out of the text on disk: tokenizers, the samples of a part, and which rank reads which sample.

    s sequence_length  b micro_batch_size

samples() opens a part (text.py) with Megatron's GPTDataset. micro_batches() is a pure function of the step, so that an exact
resume needs nothing but the step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minitron_mp.errors import InputError

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class Tokenizer:
    """What we and Megatron's GPTDatasetConfig need of a tokenizer."""

    encode: Callable[[list[str]], list[list[int]]]
    """Token ids of each text, without special tokens around them."""
    vocab_size: int
    """Largest id + 1."""
    eod: int
    """Id that ends a document."""
    bos: int | None = None
    """Id that the tokenizer itself puts before a text: a model that was trained so has large activations there (arXiv 2309.17453)."""
    pad: ClassVar[int] = -1
    """No text holds it: Megatron masks the loss where a label is the pad id, and a real id would lose its loss."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        return OrderedDict({"class": "Tokenizer", "vocab_size": self.vocab_size, "eod": self.eod})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Tokenizer of a Hugging Face folder or a sentencepiece .model file; InputError when there is none or it cannot end a document."""
    path = Path(path)
    if not (path.is_dir() or (path.suffix == ".model" and path.is_file())):
        raise InputError(
            f"no tokenizer at {path}; give a Hugging Face folder (tokenizer.json) or a sentencepiece .model file"
        )
    try:
        encode, vocab_size, eod, bos = (_hugging_face if path.is_dir() else _sentencepiece)(path)
    except Exception as error:  # whatever a foreign file makes transformers or sentencepiece raise
        raise InputError(
            f"{path} cannot be read as a tokenizer ({error}); give a Hugging Face folder or a sentencepiece .model file"
        ) from error
    if eod is None:
        raise InputError(
            f"the tokenizer in {path} has no end-of-sequence (eos) or separator (sep) token to end documents with; set eos_token"
        )
    return Tokenizer(encode, vocab_size, eod, bos)


def load_hugging_face(folder: Path, vocab_size: int) -> Any:
    """The tokenizer itself, with its special tokens and chat template; InputError when there is none or the model lacks ids of it."""
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; special tokens and chat templates need a tokenizer in the form of Hugging Face: set data.tokenizer"
        )
    loaded = load_tokenizer(folder)
    check_vocabulary(loaded, vocab_size)
    return _from_folder(folder)


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


_Parts = tuple[Callable[[list[str]], list[list[int]]], int, int | None, int | None]


def _hugging_face(folder: Path) -> _Parts:
    tokenizer = _from_folder(folder)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    eod = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    begun, bare = tokenizer("a")["input_ids"][:1], encode(["a"])[0][:1]
    return encode, max(tokenizer.get_vocab().values()) + 1, eod, None if begun == bare else begun[0]


def _sentencepiece(file: Path) -> _Parts:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    return model.encode, model.vocab_size(), model.eos_id() if model.eos_id() >= 0 else None, None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """InputError when the tokenizer has ids that the model's embedding lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding has {vocab_size} rows; "
            "set data.tokenizer to the tokenizer that the model was trained with"
        )
