"""What is stated about the programs that read exported folders: families, docs, dry run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.export import reader_lines, reader_rows
from minitron_mp.models.families.readers import READERS

PAGE = Path(__file__).parents[2] / "docs" / "pruning.md"
WIDTHS = {"product": (64, 8), "multiple": (48, 8), "any": (50, 8)}
"""Word of the page -> the first (hidden_size, heads) that only readers with this or a later word accept."""


def student(family: str, word: str, **fields) -> Arch:
    hidden_size, heads = WIDTHS[word]
    return Arch(
        family=family,
        num_layers=1,
        hidden_size=hidden_size,
        ffn_hidden_size=32,
        num_attention_heads=heads,
        num_query_groups=2,
        kv_channels=8,
        vocab_size=10,
        max_position_embeddings=16,
        **{"tied": False, **fields},
    )


def table_of_the_page() -> dict[str, dict[str, str]]:
    """Family -> reader -> word."""
    lines = PAGE.read_text().split("## Readers of the export")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (_, *readers), _, *families = rows
    return {family: dict(zip(readers, words)) for family, *words in families}


def test_page_lists_every_family_and_reader():
    table = table_of_the_page()
    assert set(table) == set(FAMILIES)
    assert all(tuple(words) == READERS for words in table.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_agrees_with_the_family(family, width):
    order, words = [*WIDTHS], table_of_the_page()[family]
    rows = reader_rows(student(family, width))
    assert [reader for reader in READERS if words[reader] != "not tried"] == [reader for reader, _ in rows]
    for reader, reason in rows:
        word = words[reader]
        accepted = word != "no" and order.index(word) >= order.index(width)
        assert (reason == "") == accepted, (family, reader, width, reason)


def test_reason_has_the_sizes_that_would_work():
    lines = reader_lines(student("qwen2", "multiple"))
    assert lines == [
        "the exported folder works with transformers 5, transformers 4",
        "the exported folder does not work with vLLM, llama.cpp, CTranslate2: it does not read head_dim, "
        "so it needs hidden_size = num_attention_heads x head_dim, here 48 and 8 x 8 = 64",
    ]
    assert reader_lines(student("gemma", "product")) == []


def test_settings_that_one_reader_ignores():
    scaled = dict(reader_rows(student("llama", "product", rope_scaling_factor=8.0)))
    assert re.search("without the scaling of Llama 3", scaled["CTranslate2"])
    tied = dict(reader_rows(student("nemotron", "product", tied=True)))
    assert "separate output layer" in tied["llama.cpp"]
