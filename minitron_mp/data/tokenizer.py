"""Tokenizer: one interface for Hugging Face folders and sentencepiece files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minitron_mp.errors import InputError

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer for this library and for Megatron's GPTDatasetConfig."""

    encode: Encode
    """Returns the token ids of each text, without special tokens."""
    vocab_size: int
    """Largest id + 1."""
    eod: int
    """Id that ends a document."""
    bos: int | None = None
    """Id that the tokenizer adds before a text, or None.

    A model that was trained with it has large activations at this position (arXiv 2309.17453).
    """
    pad: ClassVar[int] = -1
    """Id that no text contains. Megatron masks the loss of labels that equal the pad id, so a real
    id would be masked."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """Part of the identity of Megatron's dataset index."""
        return OrderedDict({"class": "Tokenizer", "vocab_size": self.vocab_size, "eod": self.eod})


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load and return the tokenizer of a Hugging Face folder or of a sentencepiece .model file.

    InputError if the path has no tokenizer, or if the tokenizer has no token that ends a document.
    """
    path = Path(path)
    if not (path.is_dir() or (path.suffix == ".model" and path.is_file())):
        raise InputError(
            f"no tokenizer at {path}; give a Hugging Face folder (tokenizer.json) or a sentencepiece "
            ".model file"
        )
    try:
        parts = _read_hugging_face(path) if path.is_dir() else _read_sentencepiece(path)
    except Exception as error:  # transformers and sentencepiece raise many types for invalid files
        raise InputError(
            f"{path} cannot be read as a tokenizer ({error}); give a Hugging Face folder or a sentencepiece "
            ".model file"
        ) from error
    if parts.eod is None:
        raise InputError(
            f"the tokenizer in {path} has no end-of-sequence (eos) or separator (sep) token to end documents "
            "with; set eos_token"
        )
    return Tokenizer(parts.encode, parts.vocab_size, parts.eod, parts.bos)


def load_hugging_face(folder: Path, vocab_size: int) -> Any:
    """Load and return the transformers tokenizer, with its special tokens and chat template.

    InputError if the folder has no tokenizer, or if the model has no embedding for some ids.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; special tokens and chat templates need a Hugging Face tokenizer, so "
            "set data.tokenizer to a folder"
        )
    check_vocabulary(load_tokenizer(folder), vocab_size)
    return _from_folder(folder)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise InputError if the model has no embedding for some ids of the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's embedding has "
            f"{vocab_size} rows; set data.tokenizer to the tokenizer that the model was trained with"
        )


@dataclass(frozen=True)
class _TokenizerParts:
    """Fields of a Tokenizer. eod is None if the tokenizer has no such token."""

    encode: Encode
    vocab_size: int
    eod: int | None
    bos: int | None


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _read_hugging_face(folder: Path) -> _TokenizerParts:
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
    first = tokenizer("a")["input_ids"][:1]
    bos = None if first == encode(["a"])[0][:1] else first[0]
    return _TokenizerParts(encode, max(tokenizer.get_vocab().values()) + 1, eod, bos)


def _read_sentencepiece(file: Path) -> _TokenizerParts:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    eod = model.eos_id() if model.eos_id() >= 0 else None
    return _TokenizerParts(model.encode, model.vocab_size(), eod, None)
