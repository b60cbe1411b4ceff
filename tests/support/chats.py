"""A tokenizer with a chat template in ChatML, and chats with the text that the template makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '<call>' + (call.function | tojson) + '</call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

Pieces = list[tuple[str, int]]
"""(text, whether it counts in the loss) of the pieces of a chat."""


def make_chat_tokenizer(folder: Path, template: str | None = TEMPLATE, *, eos: str = SPECIAL[0]) -> Path:
    """Write a byte-level tokenizer of about 350 tokens, and return its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"user assistant system answer {i}, question {i}" for i in range(50)]
    fast.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=eos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def pieces_of(messages: list[dict[str, Any]], beginning: str = "") -> Pieces:
    """Return what TEMPLATE makes of messages without tool calls, written out by hand."""
    pieces: Pieces = [(beginning, 0)] if beginning else []
    for message in messages:
        end = f"{message['content']}<|im_end|>"
        if message["role"] == "assistant":
            pieces += [("<|im_start|>assistant\n", 0), (end, 1), ("\n", 0)]
        else:
            pieces.append((f"<|im_start|>{message['role']}\n{end}\n", 0))
    return pieces


def make_chats(count: int, first: int = 0) -> list[list[dict[str, Any]]]:
    """Return chats of one to three questions, of which every third has a system message."""
    chats = []
    for number in range(first, first + count):
        messages = [turn("system", "Be brief.")] if number % 3 == 0 else []
        for i in range(1 + number % 3):
            messages += [
                turn("user", f"question {i} of {number}: what is {number} + {i}?"),
                turn("assistant", f"answer {number + i}" + " \U0001f600" * (number % 2)),
            ]
        chats.append(messages)
    return chats
