"""Chats to token ids, with the mask of the tokens that the assistant wrote.

A chat template with {% generation %} and {% endgeneration %} around the assistant's text marks these
characters. A token counts in the loss if it has one of them. Apart from tokens that begin or end
inside of a character, these are the assistant_masks of transformers' apply_chat_template(). That
function finds the last token of a span by its last character. If no token or several tokens have
this character, it masks too much or too little.

A process that encodes chats imports transformers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron_mp.data.documents import Document
from minitron_mp.data.record_fields import TOOLS
from minitron_mp.data.tokenizer import FastEncoder, Tokenizer, from_folder
from minitron_mp.errors import InputError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""The mark at which the assistant's text begins."""

DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of transformers for the templates of a tokenizer that has several."""

Span = tuple[int, int]
"""First and end character of a text."""


@dataclass(frozen=True)
class EncodedChat:
    """Token ids of a chat, and uint8 mask: 1 for tokens that count in the loss."""

    ids: list[int]
    mask: np.ndarray


@dataclass(frozen=True)
class ChatEncoder:
    """Renders and encodes chats. It can be pickled."""

    encoder: FastEncoder
    eod: int
    templates: Mapping[str, str]
    """Name -> template, at least DEFAULT."""
    special_tokens: Mapping[str, object]
    """Variables of the templates, such as bos_token."""

    @property
    def digest(self) -> str:
        """Hash of the templates and their variables."""
        content = json.dumps([dict(self.templates), dict(self.special_tokens)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode(errors="backslashreplace")).hexdigest()[:16]

    def __call__(self, chats: Sequence[Document]) -> list[EncodedChat]:
        """Return the tokens of each chat. The template adds bos, and eod is added if it is missing.

        InputError with the place of a chat that the template refuses, or without tokens of the
        assistant.
        """
        rendered = [self._render(chat) for chat in chats]
        encoded = []
        for chat, (_, spans), row in zip(
            chats, rendered, self.encoder.with_offsets([text for text, _ in rendered])
        ):
            ids, offsets = row
            mask = token_mask(offsets, spans)
            if not mask.any():
                raise InputError(
                    f"{chat.place_of('')} is a chat without text of the assistant, so no token of it counts "
                    "in the loss; correct or delete it"
                )
            if ids[-1] != self.eod:
                ids = [*ids, self.eod]
                mask = np.append(mask, np.uint8(0))
            encoded.append(EncodedChat(ids, mask))
        return encoded

    def _render(self, chat: Document) -> tuple[str, list[Span]]:
        """Return the text of a chat, and the spans of the assistant's text."""
        content = json.loads(chat.text)
        tools = content.get(TOOLS)
        name = WITH_TOOLS if tools and WITH_TOOLS in self.templates else DEFAULT
        try:
            return self.render(self.templates[name], content["messages"], tools)
        except Exception as error:  # templates raise any type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{chat.place_of('')} is a chat that the chat template cannot render ({reason}); correct or "
                "delete it, or set data.chat_template"
            ) from error

    def render(
        self, template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        """Return the text of messages, and the spans of the assistant's text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.special_tokens,
        )
        return texts[0], spans[0]


def token_mask(offsets: Sequence[Span], spans: Sequence[Span]) -> np.ndarray:
    """Return uint8 [n]: 1 for tokens that have a character of a span. offsets: spans of n tokens.

    Some tokenizers leave white space out of the offsets. A token of nothing else has an empty span,
    and gets the characters since the last token.
    """
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    previous = np.maximum.accumulate(np.concatenate([[0], ends[:-1]])) if len(ends) else ends
    starts = np.where(starts == ends, np.minimum(previous, starts), starts)
    mask = np.zeros(len(ends), np.uint8)
    for first, end in spans:
        mask |= np.maximum(starts, first) < np.minimum(ends, end)
    return mask


def load_chat_encoder(tokenizer: Tokenizer, template_file: str | None = None) -> ChatEncoder:
    """Return the encoder of chats for a tokenizer. template_file: default: the tokenizer's template.

    InputError if there is no template, or if it does not mark the assistant's text.
    """
    if tokenizer.path is None or not isinstance(tokenizer.encode, FastEncoder):
        raise InputError(
            f"data.chat_field is set, and the tokenizer {tokenizer.path or ''} does not give the positions "
            "of tokens in a text; set data.tokenizer to a folder with tokenizer.json"
        )
    loaded = from_folder(tokenizer.path)
    if template_file is None:
        source, templates = f"the chat template of {tokenizer.path}", _templates_of(loaded)
        if DEFAULT not in templates:
            raise InputError(
                f"data.chat_field is set, and the tokenizer {tokenizer.path} has no chat template; set "
                "data.chat_template to a file with a template"
            )
    else:
        source, templates = f"data.chat_template {template_file}", {DEFAULT: _read(Path(template_file))}
    templates = {name: text for name, text in templates.items() if name in (DEFAULT, WITH_TOOLS)}
    for text in templates.values():
        if not GENERATION.search(text):
            raise InputError(
                f"{source} does not mark the text of the assistant, which counts in the loss; set "
                "data.chat_template to a copy of it with {% generation %} and {% endgeneration %} around "
                "this text (docs/text.md)"
            )
        if "strftime_now" in text:
            raise InputError(
                f"{source} writes the current date (strftime_now) into each chat, so the text would "
                "differ from day to day; set data.chat_template to a copy of it with a fixed date"
            )
    encoder = ChatEncoder(tokenizer.encode, tokenizer.eod, templates, dict(loaded.special_tokens_map))
    for text in templates.values():
        _check_syntax(encoder, text, source)
    return encoder


def _templates_of(loaded: Any) -> dict[str, str]:
    template = loaded.chat_template
    if template is None:
        return {}
    return dict(template) if isinstance(template, Mapping) else {DEFAULT: template}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"data.chat_template: {file} is not UTF-8 text ({error}); convert it") from error
    except OSError as error:
        raise InputError(
            f"data.chat_template: {file} cannot be read: {error.strerror}; give a file with a Jinja template"
        ) from error


def _check_syntax(encoder: ChatEncoder, template: str, source: str) -> None:
    """Raise InputError if a template is no Jinja template."""
    from jinja2 import TemplateSyntaxError

    try:
        encoder.render(template, [{"role": "user", "content": "a"}], None)
    except TemplateSyntaxError as error:
        raise InputError(
            f"{source} is no valid Jinja template: line {error.lineno}: {error}; correct it"
        ) from error
    except Exception:  # the template may refuse this chat
        return
