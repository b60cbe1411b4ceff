"""Model folders that people have: what is read, and the message for what cannot be read."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from test_hf import LLAMA3, TOKENS, canonical, edit, logits, make_folder

from minitron_mp.errors import InputError
from minitron_mp.models.hf_config import new_config, read_arch
from minitron_mp.models.hf_weights import HFWeights, check_weights
from minitron_mp.models.hf_writer import write_folder
from minitron_mp.models.model_folder import asset_files, folder_notes, model_files
from minitron_mp.workflow.file_checks import read_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("made") / "llama", "llama")


@pytest.fixture
def llama(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "llama")


def change_weights(folder: Path, change) -> Path:
    """Replace the tensors by change(tensors)."""
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    return folder


def message(folder: Path) -> str:
    """The InputError of reading a folder with its weights."""

    def read() -> None:
        canonical(folder, read_arch(folder))

    with pytest.raises(InputError) as caught:
        read()
    return str(caught.value)


def exported(source: Path, out: Path) -> Path:
    arch = read_arch(source)
    write_folder(out, source, arch, torch.float32, canonical(source, arch))
    return out


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# dtypes


@pytest.mark.parametrize(
    ("part", "rest", "widest"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float16),
    ],
)
@pytest.mark.parametrize("where", [".layers.1.", "norm", "k_proj"])
def test_mixed_dtypes_are_stored_in_the_widest(llama, part, rest, widest, where):
    change_weights(
        llama,
        lambda tensors: {
            name: tensor.to(part if where in name else rest) for name, tensor in tensors.items()
        },
    )
    arch = read_arch(llama)
    weights = HFWeights(llama, arch)
    assert weights.dtype == widest
    assert len(weights.notes) == (part != rest)
    assert not weights.notes or f"stored as {str(widest).removeprefix('torch.')}" in weights.notes[0]
    stored = load_file(llama / "model.safetensors")
    assert {weights.tensor(key).dtype for key in arch.shapes()} == {widest}
    assert torch.equal(
        weights.tensor("decoder.final_layernorm.weight"), stored["model.norm.weight"].to(widest)
    )


# tied embeddings


def test_tied_model_saved_under_the_name_of_the_head(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "tied", "llama-tied")
    expected = canonical(folder, read_arch(folder))
    save_model(AutoModelForCausalLM.from_pretrained(folder), str(folder / "model.safetensors"))
    assert EMBED not in load_file(folder / "model.safetensors")
    for (key, before), (_, after) in zip(expected, canonical(folder, read_arch(folder))):
        assert torch.equal(before, after), key


def test_head_and_embedding_of_a_folder_without_tie_flag(llama):
    edit(llama, tie_word_embeddings=...)
    assert not read_arch(llama).tied
    change_weights(llama, lambda tensors: {name: t for name, t in tensors.items() if name != HEAD})
    assert "lm_head.weight is missing; if the output layer shares the embedding, set tie_word" in message(
        llama
    )


def test_tied_head_must_equal_the_embedding(llama):
    assert "lm_head.weight differs from model.embed" in message(edit(llama, tie_word_embeddings=True))


# names


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (prefixed("_orig_mod."), "21 of 21 weight names begin with '_orig_mod.' .*torch.compile.*_orig_mod"),
        (prefixed("module."), "begin with 'module.' .*model.module"),
        (prefixed("model."), r"begin with 'model.' .*model\.model\.layers"),
        (prefixed("language_model."), "begin with 'language_model.' .*rename the tensors"),
        (
            lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items() if name != HEAD},
            "lack the prefix 'model.' .*complete model",
        ),
        (lambda tensors: {}, "model.embed_tokens.weight is missing(.|\n)*and 13 more"),
    ],
    ids=["compiled", "ddp", "twice", "vision", "base-model", "empty"],
)
def test_wrong_names_give_one_short_message(llama, change, said):
    change_weights(llama, change)
    text = message(llama)
    assert re.search(said, text), text
    assert len(text.splitlines()) <= 10


def test_dtype_is_named_before_the_scales_of_a_quantized_folder(llama):
    def quantize(tensors):
        return tensors | {UP: tensors[UP].to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)}

    text = message(change_weights(llama, quantize))
    assert f"1 of 21 tensors are F8_E4M3, for example {UP}" in text
    assert "scale_inv" not in text


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (UP, torch.zeros(3, 5), r"up_proj.weight has shape (3, 5), config.json requires (40, 36)"),
        (
            UP,
            torch.zeros(0),
            "has shape (0,), config.json requires (40, 36); an empty tensor is what DeepSpeed",
        ),
        (
            UP,
            torch.zeros(40, 36, dtype=torch.int8),
            f"tensors are I8, for example {UP}; supported: F32, BF16, F16; load the model",
        ),
        (UP, torch.full((40, 36), torch.nan), "up_proj.weight has 1,440 values of 1,440 that are NaN"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(72), "q_proj.bias is not a weight of a llama"),
        ("model.layers.0.mlp.empty", torch.zeros(0), "mlp.empty is not a weight of a llama"),
    ],
    ids=["shape", "empty", "int8", "nan", "bias", "empty-extra"],
)
def test_wrong_tensor_is_named(llama, name, tensor, said):
    assert said in message(change_weights(llama, lambda tensors: tensors | {name: tensor}))


# files


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files with an index, and return its weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_tensor_in_two_shards(llama):
    before = canonical(llama, read_arch(llama))
    weight_map = shard(llama)
    other = next(file for file in weight_map.values() if file != weight_map[UP])
    right = load_file(llama / weight_map[UP])[UP]
    save_file(load_file(llama / other) | {UP: right}, llama / other)
    for (key, one), (_, two) in zip(before, canonical(llama, read_arch(llama))):
        assert torch.equal(one, two), key
    save_file(load_file(llama / other) | {UP: right + 1}, llama / other)
    assert f"{UP} is in 2 files of {llama} with different values" in message(llama)


def test_single_file_beside_an_index(llama):
    single = (llama / "model.safetensors").read_bytes()
    shard(llama)
    (llama / "model.safetensors").write_bytes(single)
    notes = HFWeights(llama, read_arch(llama)).notes
    assert notes == ["model.safetensors.index.json is ignored, because model.safetensors exists"]


def test_missing_shards_are_counted(llama):
    weight_map = {f"name{n}": f"model-{n:05}.safetensors" for n in range(40)}
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = message(llama)
    assert "model-00000.safetensors is missing" in text
    assert text.endswith("and 32 more")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xef\xbb\xbf{}", "config.json begins with a byte order mark.*save it as UTF-8"),
        ("{}".encode("utf-16"), "config.json is UTF-16 text"),
        (b'{"hidden_size": 64, // width\n}', "config.json is damaged .*without comments and trailing commas"),
        (b'{"model_type": "llama",}', "config.json is damaged .*trailing commas"),
        (b'{"model_type": "\xe9"}', "config.json is damaged .*UTF-8"),
        (b"", "config.json is damaged"),
        (b"[]", "config.json contains list"),
        (b"[" * 100000, "config.json is damaged"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_unreadable_config(llama, content, said, weights):
    (llama / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_arch(llama, weights=weights)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", b"\xef\xbb\xbf{}", "tokenizer.json begins with a byte order mark"),
        ("generation_config.json", b"[1]", "generation_config.json contains list"),
        ("generation_config.json", b"{", "generation_config.json is damaged"),
        ("tokenizer_config.json", "{}".encode("utf-16"), "tokenizer_config.json is UTF-16 text"),
    ],
)
def test_unreadable_side_file(llama, file, content, said):
    (llama / file).write_bytes(content)
    assert said in message(llama)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_link_to_a_missing_blob(llama, name):
    (llama / name).unlink()
    (llama / name).symlink_to("../../blobs/0123abc")
    assert f"{name} cannot be read: it is a link to ../../blobs/0123abc, which does not exist" in message(
        llama
    )


def test_folder_that_is_something_else(llama, tmp_path, monkeypatch):
    assert "config.json is not a folder but a file; give a Hugging Face" in message(llama / "config.json")
    assert "is not a folder; give a Hugging Face model folder" in message(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to("nowhere")
    assert "link is not a folder: it is a link to nowhere, which does not exist" in message(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert "`hf download acme/tiny-7B --local-dir tiny-7B`" in message(Path("acme/tiny-7B"))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "pickled weights"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights"),
        ("adapter_config.json", "LoRA adapter; merge it"),
        ("model-q4.gguf", "a GGUF model of llama.cpp"),
        ("consolidated.00.pth", "format of the model's authors"),
        ("__0_0.distcp", "sharded training checkpoint"),
    ],
)
def test_folder_with_another_format(tmp_path, file, said):
    (tmp_path / file).write_bytes(b"")
    assert said in message(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_file_without_permission(llama, name):
    (llama / name).chmod(0)
    assert f"{name} cannot be read" in message(llama)


def test_templates_in_a_folder_reach_the_export(llama, tmp_path):
    templates = llama / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (llama / "chat_template.jinja").write_text("{{ 1 }}")
    (llama / "added_tokens.json").write_text('{"<pad>": 131}')
    out = exported(llama, tmp_path / "out")
    names = {str(path.relative_to(llama)) for path in asset_files(llama)}
    assert {"additional_chat_templates/tool_use.jinja", "chat_template.jinja", "added_tokens.json"} <= names
    assert {str(path.relative_to(out)) for path in asset_files(out)} == names
    assert set(asset_files(llama)) < set(model_files(llama))


# config.json


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": ["llama"]}, r"model_type \['llama'\].*these families: llama"),
        ({"model_type": None}, "model_type None.*these families: llama"),
        ({"architectures": ["OurForCausalLM"]}, "OurForCausalLM.*these families: llama"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, not a positive integer"),
        ({"hidden_size": 36.0}, "hidden_size is 36.0, not a positive integer"),
        ({"hidden_size": "36"}, "hidden_size is '36', not a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 10,000"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; at most 2,147,483,647"),
        ({"head_dim": -8}, "head_dim is -8, not a positive integer"),
        ({"tie_word_embeddings": "perhaps"}, 'tie_word_embeddings is "perhaps", not true or false'),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; give a finite number"),
        ({"pad_token_id": 131}, "pad_token_id is 131, above the last id 130.*set it to null"),
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0 in config.json and 10000.0 in rope_parameters"),
        ({"rope_scaling": LLAMA3}, "rope_type is 'default' in rope_parameters and 'llama3' in rope_scaling"),
        (
            {"rope_parameters": ..., "rope_theta": -1},
            "rope_theta of the rope settings is -1; give a positive",
        ),
        ({"rope_parameters": ..., "rope_theta": "big"}, "rope_theta of the rope settings is 'big'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": ...}, "yarn.*remove it from"),
    ],
)
def test_unusable_setting_is_named(llama, changes, said):
    with pytest.raises(InputError, match=said):
        read_arch(edit(llama, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rope": False},
        {"rope": False},
        {"rotary_dim": 0},
        {"scale_attn_weights": False},
        {"is_causal": False},
        {"alibi": True},
        {"softmax_temp": 2.0},
        {"mlp_type": "geglu"},
        {"logit_scale": 0.5},
        {"rope_percent": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unread_setting_of_the_computation_is_rejected(llama, changes):
    (key,) = changes
    with pytest.raises(InputError, match=f"{key} is .* its name suggests that it changes the result"):
        read_arch(edit(llama, **changes))


def test_setting_without_effect_is_accepted(llama):
    arch = read_arch(llama)
    harmless = {
        "attn_implementation": "flash_attention_2",
        "use_flash_attn": True,
        "use_flash_attention": True,
        "flash_attn_version": 2,
        "original_max_position_embeddings": 64,
        "alibi": False,
        "use_mrope": False,
        "rope_interleaved": False,
        "hidden_dropout": 0.0,
        "output_attentions": False,
    }
    assert read_arch(edit(llama, **harmless)) == arch


def test_repeated_original_positions_must_agree(llama):
    scaled = {"rope_parameters": ..., "rope_scaling": LLAMA3, "original_max_position_embeddings": 8192}
    read_arch(edit(llama, **scaled))
    with pytest.raises(InputError, match=r"original_max_position_embeddings is 64 in config\.json and 8192"):
        read_arch(edit(llama, original_max_position_embeddings=64))


@pytest.mark.parametrize("name", ["rope_percent", "rope_percentage"])
def test_rope_percent_of_nemotron_must_be_the_used_factor(tmp_path, name):
    folder = make_folder(tmp_path / "nemotron", "nemotron")
    used = read_arch(folder).rotary_percent
    assert read_arch(edit(folder, **{name: used})).rotary_percent == used
    with pytest.raises(InputError, match=f"{name} is 0.125, and partial_rotary_factor is {used}"):
        read_arch(edit(folder, **{name: 0.125}))


LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_KEYS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "use_cache": True,
}
QWEN_KEYS = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "use_sliding_window": False,
}
PUBLISHED = {
    "Llama 3.1 8B": ("llama", {**LLAMA_KEYS, "rope_theta": 500000.0, "rope_scaling": LLAMA_31}),
    "Llama 3.2 1B": (
        "llama",
        {**LLAMA_KEYS, "rope_theta": 500000.0, "rope_scaling": {**LLAMA_31, "factor": 32.0}},
    ),
    "Mistral NeMo": (
        "mistral",
        {
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
    ),
    "Qwen2.5": ("qwen2", {**QWEN_KEYS, "rope_theta": 1000000.0, "sliding_window": 131072}),
    "DeepSeek-R1-Distill-Qwen": (
        "qwen2",
        {**QWEN_KEYS, "rope_theta": 10000, "sliding_window": 4096, "use_mrope": False},
    ),
    "DeepSeek-R1-Distill-Llama": (
        "llama",
        {**LLAMA_KEYS, "rope_theta": 500000.0, "rope_scaling": LLAMA_31},
    ),
    "Qwen3": (
        "qwen3",
        {
            **QWEN_KEYS,
            "attention_bias": False,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
        },
    ),
    "Minitron": (
        "nemotron",
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "relu2",
            "initializer_range": 0.0134,
            "mlp_bias": False,
            "norm_eps": 1e-05,
            "partial_rotary_factor": 0.5,
            "rope_percent": 0.5,
            "rope_theta": 10000,
            "use_cache": True,
        },
    ),
    "SmolLM2": (
        "llama",
        {
            **LLAMA_KEYS,
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 130000,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        },
    ),
    "TinyLlama": ("llama", {**LLAMA_KEYS, "rope_scaling": None, "rope_theta": 10000.0}),
    "Yi": ("llama", {**LLAMA_KEYS, "rope_scaling": None, "rope_theta": 5000000.0, "pad_token_id": 0}),
}
"""Model -> family and the keys of its published config.json, without sizes and tokens."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_of_published_models_are_accepted(tmp_path, name):
    family, keys = PUBLISHED[name]
    folder = make_folder(tmp_path / family, family)
    read_arch(edit(folder, rope_parameters=..., **keys))


def test_optional_sizes(llama):
    plain = read_arch(edit(llama, num_key_value_heads=..., head_dim=None))
    assert (plain.num_query_groups, plain.kv_channels) == (9, 4)


def test_both_forms_of_rope_are_read_if_they_agree(llama):
    rope = {"rope_theta": 5e5, **LLAMA3}
    arch = read_arch(edit(llama, rope_parameters=rope, rope_theta=500000, rope_scaling=LLAMA3))
    assert (arch.rotary_base, arch.rope_scaling_factor) == (5e5, 8.0)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_both_forms_of_rope_are_written(llama, tmp_path, scaling):
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5}
    out = exported(edit(llama, rope_parameters=rope), tmp_path / "out")
    config = config_of(out)
    assert (config["rope_theta"], config["rope_scaling"], config["rope_parameters"]) == (5e5, scaling, rope)
    new = logits(out)
    old = edit(out, rope_parameters=...)
    assert read_arch(old) == read_arch(llama)
    assert torch.equal(logits(old), new)
    assert torch.equal(new, logits(llama))


def test_partial_rotation_is_written_in_both_forms(tmp_path):
    folder = make_folder(tmp_path / "nemotron", "nemotron")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    out = exported(edit(folder, partial_rotary_factor=..., rope_parameters=rope), tmp_path / "out")
    assert config_of(out)["partial_rotary_factor"] == 1.0
    assert config_of(out)["rope_parameters"] == rope
    assert torch.equal(logits(out), logits(folder))


def test_stale_keys_of_the_source_are_dropped(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    stale = {
        "auto_map": {"AutoModelForCausalLM": "modeling_ours.Ours"},
        "_name_or_path": "/home/someone/model",
        "_commit_hash": "0123",
        "quantization_config": None,
        "_attn_implementation": "flash_attention_2",
    }
    edit(llama, **stale, transformers_version="4.40.0", torch_dtype="float16", dtype="bfloat16")
    (llama / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["ours.Ours", null]}, "é": 1}'
    )
    (llama / "modeling_ours.py").write_text("raise RuntimeError")
    assert any("auto_map" in note for note in folder_notes(llama, 131))
    out = exported(llama, tmp_path / "out")
    config = config_of(out)
    assert not stale.keys() & config.keys()
    assert config["transformers_version"] == "4.40.0"
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert json.loads((out / "tokenizer_config.json").read_text("utf-8")) == {"é": 1}
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)


def test_ids_beyond_the_vocabulary_are_not_exported(llama, tmp_path):
    settings = {"eos_token_id": [2, 131], "pad_token_id": 200, "bos_token_id": 1, "temperature": 0.5}
    (llama / "generation_config.json").write_text(json.dumps(settings))
    edit(llama, eos_token_id=131, bos_token_id=1, pad_token_id=-1)
    notes = folder_notes(llama, 131)
    assert len(notes) == 4
    assert "eos_token_id of generation_config.json is [2, 131], but the ids are 0 to 130" in notes[2]
    out = exported(llama, tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [2], "pad_token_id": None, "bos_token_id": 1, "temperature": 0.5}
    assert [config_of(out)[key] for key in ("eos_token_id", "bos_token_id", "pad_token_id")] == [
        None,
        1,
        None,
    ]
    assert torch.equal(logits(out, TOKENS), logits(llama, TOKENS))


def test_new_config_keeps_unknown_keys(llama):
    arch = read_arch(llama)
    config = new_config(config_of(llama) | {"our_note": [1]}, arch, "bfloat16")
    assert config["our_note"] == [1]
    check_weights(llama, arch)


# what is wrong with a folder is named


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ({"use_cache": None}, "use_cache is null, not true or false"),
        ({"attention_bias": None}, "attention_bias is null, not true or false"),
        ({"tie_word_embeddings": "true"}, 'tie_word_embeddings is "true", not true or false'),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5", not a number'),
        ({"initializer_range": None}, "initializer_range is null, not a number"),
        ({"eos_token_id": "2"}, 'eos_token_id is "2", not an id such as 2'),
        ({"bos_token_id": [1]}, "bos_token_id is [1], not an id such as 2"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for"),
    ],
)
def test_values_that_transformers_5_rejects_are_named(llama, change, row):
    content = config_of(llama) | change
    (llama / "config.json").write_text(json.dumps(content))
    assert message(llama).count("  - ") == 1
    assert f"  - {row}" in message(llama)


@pytest.mark.parametrize("place", ["snapshots/0123", "0123", "checkpoint-500"])
def test_subfolder_with_the_model_is_named(llama, tmp_path, place):
    cache = tmp_path / "models--a--b"
    shutil.copytree(llama, cache / place)
    (cache / "refs").mkdir()
    rows = message(cache).splitlines()[1:]
    assert rows == [f"  - no config.json, but a subfolder has one; give it: {cache / place}"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-00001-of-00002.safetensors", "the index of these files, model.safetensors.index.json, is"),
        ("model.fp16.safetensors", "the folder has model.fp16.safetensors, but no model.safetensors or"),
    ],
)
def test_weights_under_other_names_are_named(llama, name, words):
    """Also in a dry run, which needs no weights."""
    (llama / "model.safetensors").rename(llama / name)
    assert words in message(llama)
    archs = {}
    with pytest.raises(InputError, match=words):
        read_model(str(llama), archs, weights=False)
    (llama / name).unlink()
    read_model(str(llama), archs, weights=False)
    assert archs


@pytest.mark.parametrize("method", [{}, {"quant_method": "bitsandbytes"}])
def test_quantization_that_is_switched_off_is_accepted(llama, method):
    arch = read_arch(llama)
    off = method and method | {"load_in_4bit": False, "load_in_8bit": False}
    edit(llama, quantization_config=off)
    assert read_arch(llama) == arch
    edit(llama, quantization_config=method | {"load_in_4bit": True})
    assert "if its weights are not quantized, remove this key" in message(llama)


def test_adapter_beside_full_weights_is_noted(llama):
    assert not folder_notes(llama, 131)
    (llama / "adapter_config.json").write_text("{}")
    (note,) = folder_notes(llama, 131)
    assert note.startswith("adapter_config.json belongs to an adapter beside the weights, which is not used")


def test_tokenizer_of_own_code_is_exported_without_it(llama, tmp_path):
    settings = {"tokenizer_class": "MyTok", "auto_map": {"AutoTokenizer": ["my.MyTok", None]}}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    written = exported(llama, tmp_path / "out") / "tokenizer_config.json"
    assert json.loads(written.read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"extra_special_tokens": ["<a>", "<b>"]}, {"additional_special_tokens": ["<a>", "<b>"]}),
        (
            {"extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>", "<a>"]},
            {"additional_special_tokens": ["<b>", "<a>"]},
        ),
        ({"extra_special_tokens": {"image": "<a>"}}, {"extra_special_tokens": {"image": "<a>"}}),
        ({"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer"}),
    ],
    ids=["class", "list", "both lists", "dictionary", "older class"],
)
def test_tokenizer_of_transformers_5_is_exported_for_4(llama, tmp_path, settings, changes):
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    written = exported(llama, tmp_path / "out") / "tokenizer_config.json"
    assert json.loads(written.read_text()) == changes
