"""Tokenizer: one interface for Hugging Face folders and sentencepiece files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from minitron_mp.errors import InputError
from minitron_mp.models.model_folder import asset_problems, own_tokenizer_class, read_json

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer for this library and for Megatron's GPTDatasetConfig. It can be pickled."""

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
    num_embeddings: int | None = None
    """Rows of the model's embedding, if it has none for the largest ids. Otherwise None."""
    token_of: Callable[[int], str] = str
    """Returns the token of an id, for messages."""
    path: Path | None = None
    """The folder or file that it was loaded from. Chat templates are read there."""
    pad: ClassVar[int] = -1
    """Id that no text contains. Megatron masks the loss of labels that equal the pad id, so a real
    id would be masked."""

    @property
    def unique_identifiers(self) -> OrderedDict[str, object]:
        """Part of the identity of Megatron's dataset index."""
        return OrderedDict({"class": "Tokenizer", "vocab_size": self.vocab_size, "eod": self.eod})

    def id_without_embedding(self, ids: list[int]) -> int | None:
        """Return the largest of the ids if the model has no embedding for it, else None."""
        if self.num_embeddings is None or not ids:
            return None
        largest = max(ids)
        return largest if largest >= self.num_embeddings else None

    def no_embedding(self, id: int) -> str:
        """Return the end of a message about a text with an id that has no embedding."""
        return (
            f"has the token {self.token_of(id)!r} with id {id}, but the model's embedding has "
            f"{self.num_embeddings} rows; remove the token from the text, or set data.tokenizer to the "
            "tokenizer that the model was trained with"
        )


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
    except InputError:
        raise
    except Exception as error:  # transformers and sentencepiece raise many types for invalid files
        raise InputError(_cause(path, error)) from error
    eod = parts.eod if parts.eod is not None else _eos_of_model(path, parts.vocab_size)
    if eod is None:
        where = "tokenizer_config.json" if path.is_dir() else "the training of the sentencepiece model"
        raise InputError(
            f"the tokenizer in {path} has no end-of-sequence (eos) or separator (sep) token to end documents "
            f"with; set eos_token in {where}"
        )
    return Tokenizer(parts.encode, parts.vocab_size, eod, parts.bos, token_of=parts.token_of, path=path)


def _cause(path: Path, error: Exception) -> str:
    """Return why a tokenizer cannot be read. It names the side file or config.json if that is the cause.

    transformers reads config.json before the tokenizer.
    """
    problems = asset_problems(path) if path.is_dir() else []
    if problems:
        return "\n".join([f"{path} cannot be read as a tokenizer:", *(f"  - {row}" for row in problems)])
    config = path / "config.json"
    if config.is_file():
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as config_error:
            if str(config_error) == str(error):
                return f"{config} cannot be read by transformers ({_on_one_line(error)}); correct it"
    return (
        f"{path} cannot be read as a tokenizer ({_on_one_line(error)}); give a Hugging Face folder or a "
        "sentencepiece .model file"
    )


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _eos_of_model(path: Path, vocab_size: int) -> int | None:
    """Return the first eos_token_id of the config.json beside the tokenizer; None without one."""
    config = path / "config.json"
    value = read_json(config).get("eos_token_id") if config.is_file() else None
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and 0 <= first < vocab_size else None


def load_hugging_face(folder: Path, vocab_size: int) -> Any:
    """Load and return the transformers tokenizer, with its special tokens and chat template.

    InputError if the folder has no tokenizer, or if the model has no embedding for its special
    tokens.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; special tokens and chat templates need a Hugging Face tokenizer, so "
            "set data.tokenizer to a folder"
        )
    for_model(load_tokenizer(folder), vocab_size)
    return from_folder(folder)


def for_model(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Return the tokenizer for a model with vocab_size embeddings.

    The tokenizer may have ids without embedding, such as an added padding token, which no text
    contains. A text with such an id is rejected. InputError if eod or bos is such an id, because
    each text has them.
    """
    names = {"end-of-document": tokenizer.eod, "beginning-of-sequence": tokenizer.bos}
    for name, id in names.items():
        if id is not None and id >= vocab_size:
            raise InputError(
                f"the tokenizer's {name} token {tokenizer.token_of(id)!r} has id {id}, but the model's "
                f"embedding has {vocab_size} rows; set data.tokenizer to the tokenizer that the model was "
                "trained with"
            )
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    return replace(tokenizer, num_embeddings=vocab_size)


@dataclass(frozen=True)
class _TokenizerParts:
    """Fields of a Tokenizer. eod is None if the tokenizer has no such token."""

    encode: Encode
    vocab_size: int
    eod: int | None
    bos: int | None
    token_of: Callable[[int], str]


def from_folder(folder: Path) -> Any:
    """Return the transformers tokenizer of a folder. Other errors than InputError are possible."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json"
    own = own_tokenizer_class(read_json(settings)) if settings.is_file() else ""
    if own and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if own:
        raise InputError(
            f"the tokenizer in {folder} is the class {own} of a Python file in it, which is not run; "
            "save the tokenizer as tokenizer.json with save_pretrained() of transformers, or set "
            "data.tokenizer to another one"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class FastEncoder:
    """Encodes texts by the library tokenizers, without special tokens around them.

    Its pickle is small, and a process that unpickles it imports neither transformers nor torch.
    """

    def __init__(self, backend: Any, split_special_tokens: bool):
        self.backend = backend
        self.split_special_tokens = split_special_tokens
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens  # not part of the pickle of a backend

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [row.ids for row in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return the token ids of each text, and the (first, end) character of each token."""
        rows = self.backend.encode_batch(texts, add_special_tokens=False)
        return [(row.ids, row.offsets) for row in rows]

    def token_of(self, id: int) -> str:
        return str(self.backend.id_to_token(id))

    def __reduce__(self) -> tuple[object, ...]:
        return FastEncoder, (self.backend, self.split_special_tokens)


class _SlowEncoder:
    """Encodes texts by a transformers tokenizer that is written in Python."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]  # type: ignore[no-any-return]

    def token_of(self, id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(id))


def _read_hugging_face(folder: Path) -> _TokenizerParts:
    tokenizer = from_folder(folder)
    encode: FastEncoder | _SlowEncoder
    if getattr(tokenizer, "is_fast", False):
        encode = FastEncoder(tokenizer.backend_tokenizer, bool(tokenizer.split_special_tokens))
    else:
        encode = _SlowEncoder(tokenizer)
    eod = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    first = tokenizer("a")["input_ids"][:1]
    bos = None if first == encode(["a"])[0][:1] else first[0]
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return _TokenizerParts(encode, vocab_size, eod, bos, encode.token_of)


def _read_sentencepiece(file: Path) -> _TokenizerParts:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    eod = model.eos_id() if model.eos_id() >= 0 else None
    return _TokenizerParts(model.encode, model.vocab_size(), eod, None, model.id_to_piece)
