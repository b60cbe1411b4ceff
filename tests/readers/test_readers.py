"""Exported folders in the programs that read them: transformers 4, llama.cpp, CTranslate2.

`bash tests/run.sh --readers` installs them and sets MINITRON_READERS_PYTHON and
MINITRON_LLAMA_CPP_CONVERTER. MINITRON_READERS_MODEL: folder of an exported student, which is tried as
well. A student of each family has random weights. What models/families states about a reader must be
true in both directions: the logits are those of transformers, or the reader does not work.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hf import LLAMA3, random_weights
from tiny import sentences

from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.export import reader_rows
from minitron_mp.models.hf_config import read_arch
from minitron_mp.models.hf_writer import write_folder

PYTHON = os.environ.get("MINITRON_READERS_PYTHON")
MODEL = os.environ.get("MINITRON_READERS_MODEL")
READERS = ("transformers 4", "llama.cpp", "CTranslate2")
VOCAB_SIZE = 300
HEAD_DIM = 16
TEACHER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
SCALED = {"rope_parameters": {**LLAMA3, "rope_theta": 50000.0}, "tie_word_embeddings": True}
WIDTHS = {
    "same": {"hidden_size": 96, "num_attention_heads": 6, "num_query_groups": 3},  # 6 x 16
    "multiple": {"hidden_size": 96, "num_attention_heads": 8, "num_query_groups": 4},
    "other": {"hidden_size": 100, "num_attention_heads": 8, "num_query_groups": 4},
}
"""Width of a student: hidden_size = heads x head_dim, another multiple of the heads, no multiple."""
PARTIAL = {"rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5}}
TIED = {"tie_word_embeddings": True}
STUDENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-same": ("llama", ROPE, "same"),
    "llama-multiple": ("llama", ROPE, "multiple"),
    "llama-3-tied-same": ("llama", SCALED, "same"),
    "mistral-same": ("mistral", {**ROPE, "sliding_window": None}, "same"),
    "mistral-other": ("mistral", {**ROPE, "sliding_window": None}, "other"),
    "qwen2-same": ("qwen2", ROPE, "same"),
    "qwen2-tied-same": ("qwen2", {**ROPE, **TIED}, "same"),
    "qwen2-multiple": ("qwen2", ROPE, "multiple"),
    "qwen2-other": ("qwen2", ROPE, "other"),
    "qwen3-same": ("qwen3", ROPE, "same"),
    "qwen3-other": ("qwen3", {**ROPE, **TIED}, "other"),
    "nemotron-same": ("nemotron", PARTIAL, "same"),
    "nemotron-tied-same": ("nemotron", {**PARTIAL, **TIED}, "same"),
    "nemotron-multiple": ("nemotron", PARTIAL, "multiple"),
}
"""Name -> family, settings of config.json, width."""
TOLERANCE = 2e-3
"""Of the logits, relative to their largest; all programs compute in float32, in another order.
llama.cpp rounds the table of the SiLU and the softmax to float16."""

pytestmark = pytest.mark.skipif(
    PYTHON is None,
    reason="`bash tests/run.sh --readers` installs transformers 4, llama.cpp and CTranslate2 and runs this",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a sentencepiece model, which all converters read."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("tokenizer")
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(400)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 256, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Case:
    """An exported folder with the ids that all readers get."""

    folder: Path
    arch: Arch
    tokens: list[int]


@pytest.fixture(scope="module")
def cases(tokenizer, tmp_path_factory) -> dict[str, Case]:
    """Name -> student that this library has written."""
    root = tmp_path_factory.mktemp("students")
    made = {}
    for name, (family, settings, width) in STUDENTS.items():
        source = root / f"{name}-source"
        make_source(source, family, settings, tokenizer)
        teacher = read_arch(source, weights=False)
        student = teacher.resized(num_layers=2, ffn_hidden_size=128, **WIDTHS[width])
        torch.manual_seed(3)
        weights = [(key, spread(key, tensor)) for key, tensor in random_weights(student)]
        write_folder(root / name, source, student, torch.float32, iter(weights))
        tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, 48).tolist()
        made[name] = Case(root / name, student, tokens)
    if MODEL:
        from transformers import AutoTokenizer

        paragraph = AutoTokenizer.from_pretrained(MODEL)(" ".join(sentences(12)))["input_ids"]
        made["given"] = Case(Path(MODEL), read_arch(Path(MODEL)), paragraph[:200])
    return made


def make_source(folder: Path, family: str, settings: dict[str, Any], tokenizer: Path) -> None:
    """Write config.json and tokenizer of a model without weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **TEACHER | settings)
    config.architectures = [FAMILIES[family].transformers_class]
    config.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)


def spread(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a random weight of a size with which every layer changes the logits."""
    return tensor + 1 if "norm" in key and "bias" not in key else tensor * 0.6


@pytest.fixture(scope="module")
def outcomes(cases, tmp_path_factory, request) -> dict[tuple[str, str], tuple[float, str]]:
    """(case, reader) -> relative difference of the logits, and a sentence, which is printed.

    One process per reader.
    """
    expected = {name: expected_logits(case) for name, case in cases.items()}
    found = {}
    for reader in READERS:
        root = tmp_path_factory.mktemp("reader")
        jobs = []
        for name, case in cases.items():
            (root / name).mkdir()
            jobs.append({"folder": str(case.folder), "tokens": case.tokens, "work": str(root / name)})
        (root / "jobs.json").write_text(json.dumps(jobs))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        script = Path(__file__).with_name("read_models.py")
        with (root / "log").open("w") as log:
            subprocess.run(
                [str(PYTHON), str(script), reader, str(root / "jobs.json")],
                stdout=log,
                stderr=log,
                timeout=900,
                check=True,
                env=environment | {"HF_HUB_OFFLINE": "1"},
            )
        for name, case in cases.items():
            found[name, reader] = compare(expected[name], case.tokens, root / name)
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print()
        for (name, reader), (_, text) in found.items():
            print(f"{name:22} {reader:15} {text}")
    return found


def expected_logits(case: Case) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([case.tokens])).logits[0].numpy()


def compare(expected: np.ndarray, tokens: list[int], work: Path) -> tuple[float, str]:
    """Return the largest difference of the logits, relative to the largest logit, and a sentence."""
    if (work / "error.txt").is_file():
        return np.inf, f"does not read it: {' '.join((work / 'error.txt').read_text().split())[:110]}"
    if not (work / "logits.npy").is_file():
        return np.inf, "does not read it: the program aborted"
    found = np.load(work / "logits.npy")
    if found.shape != expected.shape:
        return np.inf, f"logits of shape {found.shape}, expected {expected.shape}"
    difference, largest = np.abs(found - expected).max(), np.abs(expected).max()
    nats = [log_likelihood(logits, tokens) for logits in (expected, found)]
    return float(difference / largest), (
        f"max logit difference {difference:.1e} of {largest:.1f}, log-likelihood {nats[1]:.4f}, "
        f"transformers 5 {nats[0]:.4f}"
    )


def log_likelihood(logits: np.ndarray, tokens: list[int]) -> float:
    """Return the sum of the log-probabilities of all tokens but the first."""
    log_p = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    return float(log_p[:-1].gather(-1, torch.tensor(tokens)[1:, None]).sum())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [*STUDENTS, *(["given"] if MODEL else [])])
def test_reader_accepts_what_the_family_states(name, reader, cases, outcomes):
    reason = dict(reader_rows(cases[name].arch))[reader]
    difference, text = outcomes[name, reader]
    if reason:
        assert difference > 10 * TOLERANCE, f"{reader} works, but the family states: {reason}"
    else:
        assert difference < TOLERANCE, text
