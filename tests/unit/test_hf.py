"""Hugging Face folders: bitwise round trips, equal logits, one error per invalid input."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from cases import BY_NAME, make_samples
from safetensors.torch import load_file, save_file

from minitron_mp.errors import InputError
from minitron_mp.models import families
from minitron_mp.models.arch import Arch
from minitron_mp.models.families import FAMILIES
from minitron_mp.models.families.family import CONFIG_FIELDS, DEFAULTS, DROPOUT_WORDS, Family
from minitron_mp.models.hf_config import read_arch, unused_setting_notes
from minitron_mp.models.hf_weights import HFWeights, check_weights, hf_shapes, to_hf
from minitron_mp.models.hf_writer import write_folder
from minitron_mp.models.model_folder import asset_files
from minitron_mp.models.parameters import dims_of, layer_key

QKV = "self_attention.linear_qkv.weight"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES = {
    "llama": {"rms_norm_eps": 1e-5},
    "llama-tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}},
    "mistral": {
        "sliding_window": None,
        "hidden_size": 40,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "qwen2": {"tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 9},
    "nemotron": {"norm_eps": 1e-5},
    "seed_oss": {"hidden_size": 40},
}


TOKENS = torch.arange(60).reshape(2, 30)


def make_folder(folder: Path, case: str, **save) -> Path:
    """A small random model of the family, written by transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.split("-")[0], **SIZES | CASES[case], initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.normal_(1, 0.3)
    model.save_pretrained(folder, **save)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """case -> folder, made once."""
    root = tmp_path_factory.mktemp("hf")
    return {case: make_folder(root / case, case) for case in CASES}


@pytest.fixture
def llama(tmp_path, folders):
    """A copy of the llama folder to damage."""
    return shutil.copytree(folders["llama"], tmp_path / "llama")


def edit(folder: Path, **changes) -> Path:
    """Change config.json; ... removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def canonical(folder: Path, arch: Arch):
    weights = HFWeights(folder, arch)
    return [(key, weights.tensor(key)) for key in arch.shapes()]


def random_weights(arch: Arch):
    return [(key, torch.randn(shape) / 3) for key, shape in arch.shapes().items()]


def logits(folder: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise(case, folders):
    arch = read_arch(folders[case])
    original, back = load_file(folders[case] / "model.safetensors"), {}
    for key, tensor in canonical(folders[case], arch):
        assert tensor.shape == arch.shapes()[key]
        assert dims_of(key)[0] != "vocab" or not tensor[arch.vocab_size :].any(), "padding is not zero"
        back |= to_hf(key, tensor, arch)
    assert back.keys() == original.keys() == hf_shapes(arch).keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("case", CASES)
def test_exported_folder_gives_the_same_logits(case, folders, tmp_path):
    source, arch = folders[case], read_arch(folders[case])
    write_folder(tmp_path / "out", source, arch, torch.float32, canonical(source, arch))
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    assert read_arch(tmp_path / "out") == arch
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert before.items() <= after.items(), "a field of the source's config.json is lost or changed"
    assert {path.name for path in asset_files(tmp_path / "out")} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "LICENSE",
    }
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (
        tmp_path / "out" / "config.json"
    ).stat().st_mode


@pytest.mark.parametrize("case", CASES)
def test_megatron_logits_match_transformers(case, folders, tmp_path, ranks):
    """Logits of the model, and of a student with fewer query groups and hidden != heads x head_dim.

    Float32. Kernels and the order of sums differ; 5e-6 seen.
    """
    teacher = read_arch(folders[case])
    groups = teacher.num_query_groups * 2 // 3
    heads = {"num_query_groups": groups, "num_attention_heads": groups * min(2, teacher.heads_per_group)}
    student = teacher.resized(hidden_size=20, ffn_hidden_size=24, **heads)
    torch.manual_seed(1)
    weights = random_weights(student)
    write_folder(tmp_path / "student", folders[case], student, torch.float32, iter(weights))
    for name, folder, arch in (("model", folders[case], teacher), ("student", tmp_path / "student", student)):
        assert (
            ranks(
                1, "model_workers.write_hugging_face", folder=tmp_path / name / "checkpoint", source=folder
            )[0]
            == arch
        )
        model = {name: (arch, tmp_path / name / "checkpoint")}
        ours = ranks(1, "model_workers.load_and_run", layout=BY_NAME["one"], models=model)[0][name][
            ..., : arch.vocab_size
        ]
        want = logits(folder, make_samples(arch, 0, 8)["tokens"])
        assert want.abs().max() > 0.5
        torch.testing.assert_close(ours, want, atol=2e-4, rtol=0)


def test_smaller_student_in_bfloat16_shards(folders, tmp_path):
    source, teacher = folders["qwen3"], read_arch(folders["qwen3"])
    student = teacher.resized(num_layers=1, hidden_size=20, ffn_hidden_size=24)
    tensors = random_weights(student)
    out = tmp_path / "out"
    write_folder(out, source, student, torch.bfloat16, iter(tensors[::-1]), max_shard_bytes=8_000)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) == 4
    assert shards[0] == "model-00001-of-00004.safetensors"
    assert all((out / name).stat().st_size < 9_000 for name in shards)
    assert not list(out.glob(".*")), "temporary shards are left"
    check_weights(out, student)
    assert read_arch(out) == student
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in canonical(out, student))
    assert logits(out).shape == (2, 30, 131)


def test_llama_exported_as_mistral_gives_the_same_logits(folders, tmp_path):
    arch = read_arch(folders["llama"])
    write_folder(
        tmp_path,
        folders["llama"],
        arch.model_copy(update={"family": "mistral"}),
        torch.float32,
        canonical(folders["llama"], arch),
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["sliding_window"]) == (
        "mistral",
        ["MistralForCausalLM"],
        None,
    )
    assert not {"pretraining_tp", "mlp_bias", "attention_bias"} & config.keys()
    assert torch.equal(logits(tmp_path), logits(folders["llama"]))


def test_qkv_rows_are_interleaved_by_group():
    arch = Arch(
        family="llama",
        num_layers=1,
        hidden_size=1,
        ffn_hidden_size=1,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=2,
        vocab_size=2,
        max_position_embeddings=8,
        tied=True,
    )
    rows = torch.tensor(
        [[0, 1, 10, 11, 100, 101, 200, 201], [20, 21, 30, 31, 110, 111, 210, 211]], dtype=torch.float32
    )
    parts = to_hf(layer_key(0, QKV), rows.reshape(16, 1), arch)
    assert {name.split(".")[-2]: part.flatten().tolist() for name, part in parts.items()} == {
        "q_proj": [0, 1, 10, 11, 20, 21, 30, 31],
        "k_proj": [100, 101, 110, 111],
        "v_proj": [200, 201, 210, 211],
    }


def test_sharded_folder_reads_like_a_single_file(folders, tmp_path):
    make_folder(tmp_path, "llama", max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    arch = read_arch(tmp_path)
    for (key, a), (_, b) in zip(canonical(tmp_path, arch), canonical(folders["llama"], arch)):
        assert torch.equal(a, b), key
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-\d+.safetensors is missing"):
        read_arch(tmp_path)


def test_transformers_4_config_reads_like_transformers_5(llama):
    new = read_arch(edit(llama, rope_parameters={"rope_theta": 5e5, **LLAMA3}))
    assert (new.rotary_base, new.rope_scaling_factor) == (5e5, 8.0)
    old = edit(
        llama,
        rope_parameters=...,
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        architectures=["LlamaForCausalLM"],
        torch_dtype="float32",
        dtype=...,
    )
    assert read_arch(old) == new
    plain = read_arch(edit(llama, rope_scaling=None, rope_theta=..., head_dim=..., num_key_value_heads=...))
    assert (plain.rotary_base, plain.rope_scaling_factor, plain.kv_channels, plain.num_query_groups) == (
        10000.0,
        None,
        4,
        9,
    )
    # Linear scaling divides the positions by its factor.
    assert read_arch(edit(llama, rope_scaling={"type": "linear", "factor": 1.0})) == plain


def test_defaults_match_transformers():
    from transformers import AutoConfig

    for family in FAMILIES.values():
        check_defaults(family, AutoConfig.for_model(family.name))


def check_defaults(family: Family, config) -> None:
    """Each default of a key that the family reads is that of transformers' class.

    The names are those of the file, because transformers also accepts aliases as attributes.
    """
    assert type(config).model_type == family.name
    assert config.rope_parameters["rope_theta"] == 10000.0
    written = {
        **config.to_dict(),
        "partial_rotary_factor": config.rope_parameters.get("partial_rotary_factor"),
    }
    optional = [family.config_fields[name] for name in ("tied", "norm_epsilon")]
    assumed = {**DEFAULTS, **family.defaults}
    for key in {*optional, *family.defaults}:
        assert (key, written[key]) == (key, assumed.get(key)), family.name


def test_defaults_of_a_family_with_other_names():
    """The key of the epsilon is norm_eps, and the class has rms_norm_eps as an alias, as LFM3."""
    from transformers import NemotronConfig

    class Aliased(NemotronConfig):
        attribute_map: ClassVar = {"rms_norm_eps": "norm_eps"}

    nemotron = FAMILIES["nemotron"]
    config = Aliased()
    assert config.rms_norm_eps == config.norm_eps == 1e-5
    check_defaults(nemotron, config)
    with pytest.raises(KeyError, match="rms_norm_eps"):  # no key of the file
        check_defaults(replace(nemotron, config_fields=CONFIG_FIELDS), config)
    with pytest.raises(AssertionError, match="norm_eps"):  # no default
        check_defaults(replace(nemotron, defaults={}), config)


def test_every_setting_of_transformers_is_supported_or_listed():
    """A new family cannot forget a key of its class: it has a field, or no effect on the logits.

    If the file lacks a required key, transformers uses its default. That default must equal the
    required value. Otherwise add it to `defaults`; then a file without the key is rejected.
    """
    from transformers import AutoConfig, PretrainedConfig

    no_effect = {"initializer_range", "pretraining_tp", "use_cache"}
    no_effect |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    for family in FAMILIES.values():
        written = AutoConfig.for_model(family.name).to_dict()
        own = written.keys() - PretrainedConfig().to_dict().keys()
        own = {key for key in own if not any(word in key for word in DROPOUT_WORDS)}
        assert own - family.settings - no_effect == set(), family.name
        for key in (own & family.required_settings.keys()) - family.defaults.keys():
            assert (key, written[key]) == (key, family.required_settings[key]), family.name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
            "gpt_oss.*GptOssForCausalLM.*of these families: llama",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias is True; this package supports only False"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this package supports only 'silu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*fp8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor.*0.5"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor.*0.5",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one setting for all layers"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2}}, "low_freq_factor.* 2; only 1"),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "no factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 128},
            "sliding_window is 128.*256; set it to null",
        ),
        (
            {"model_type": "mistral", "architectures": None, "max_position_embeddings": 8192},
            "sliding_window is 4096",
        ),
        ({"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; the family llama does not read"),
        ({"use_bias": True}, "use_bias is True"),
        (
            {"rotary_emb_base": 5e5},
            "rotary_emb_base is 500000.0.*Remove it .* if LlamaForCausalLM ignores it",
        ),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]}},
            "the rope settings have mrope_section; supported: factor,",
        ),
        ({"hidden_size": ...}, "hidden_size is None"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"num_key_value_heads": 2}, "num_attention_heads 9 is not a multiple of num_key_value_heads 2"),
    ],
)
def test_unsupported_config_is_rejected(llama, changes, said):
    with pytest.raises(InputError, match=said):
        read_arch(edit(llama, **changes))


def test_class_of_the_vendor_is_accepted_if_the_family_lists_it(llama, monkeypatch):
    arch = read_arch(llama)
    edit(llama, architectures=["VendorForCausalLM"])
    with pytest.raises(InputError, match=r"architectures \['VendorForCausalLM'\] is not supported"):
        read_arch(llama)
    listed = replace(FAMILIES["llama"], other_architectures=("VendorForCausalLM",))
    monkeypatch.setitem(FAMILIES, "llama", listed)
    assert read_arch(llama) == arch
    with pytest.raises(InputError, match="LlamaForCausalLM', 'VendorForCausalLM"):
        read_arch(edit(llama, architectures=["LlamaForCausalLM", "VendorForCausalLM"]))


def test_other_keys_are_ignored(llama):
    arch = read_arch(llama)
    harmless = {"use_bias": False, "final_logit_softcapping": None, "pretraining_tp": 2, "_attn": "eager"}
    assert read_arch(edit(llama, **harmless)) == arch


def test_dropout_is_accepted_with_a_note(llama):
    arch = read_arch(llama)
    assert unused_setting_notes(llama) == []
    edit(llama, attention_dropout=0.1, residual_dropout=0.0, resid_pdrop=0.2)
    assert read_arch(llama) == arch
    assert unused_setting_notes(llama) == [
        "config.json has attention_dropout 0.1, resid_pdrop 0.2; not used, because this package trains "
        "without dropout"
    ]


def test_all_problems_are_reported_together(llama, tmp_path):
    (llama / "model.safetensors").unlink()
    with pytest.raises(InputError) as told:
        read_arch(
            edit(llama, mlp_bias=True, hidden_act="relu", rope_scaling={"type": "dynamic"}, vocab_size=0)
        )
    assert all(
        word in str(told.value)
        for word in ("no model.safetensors", "mlp_bias", "hidden_act", "dynamic", "vocab_size")
    )
    (llama / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(InputError, match=r"index\.json has no weight_map of weight names to files"):
        read_arch(llama)
    (llama / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=r"rope settings .*linear.* are not supported"):
        read_arch(edit(llama, rope_scaling="linear"))
    (llama / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is damaged"):
        read_arch(llama)
    (llama / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config.json.*\n.*no model.safetensors"):
        read_arch(llama)
    with pytest.raises(InputError, match=r"nowhere is not a folder"):
        read_arch(tmp_path / "nowhere")


def test_mismatched_weights_are_named(llama):
    arch, file = read_arch(llama), llama / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, file)
    with pytest.raises(InputError) as told:
        check_weights(llama, arch)
    assert str(told.value).splitlines()[1:] == [
        "  - model.norm.weight is missing",
        "  - model.layers.0.mlp.up_proj.weight has shape (3, 5), config.json requires (40, 36)",
        "  - model.layers.7.mlp.up_proj.weight is not a weight of a llama with this config.json",
    ]
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        check_weights(llama, arch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weight_is_named(llama, value):
    arch, tensors = read_arch(llama), load_file(llama / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 3] = value
    save_file(tensors, llama / "model.safetensors")
    weights = HFWeights(llama, arch)
    weights.tensor(layer_key(0, QKV))
    with pytest.raises(
        InputError, match=r"model.layers.1.self_attn.k_proj.weight has 1 values of 864 that are NaN"
    ):
        weights.tensor(layer_key(1, QKV))


def test_tied_model_may_store_a_head_equal_to_the_embedding(folders, llama):
    arch, tensors = (
        read_arch(folders["llama"]).model_copy(update={"tied": True}),
        load_file(llama / "model.safetensors"),
    )
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but lm_head.weight differs"):
        HFWeights(llama, arch).tensor("embedding.word_embeddings.weight")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        llama / "model.safetensors",
    )
    HFWeights(llama, arch).tensor("embedding.word_embeddings.weight")


def test_every_file_of_the_folder_is_a_family_with_a_case():
    folder = Path(families.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - {"__init__", "family", "export", "readers"}
    assert {case.split("-")[0] for case in CASES} == set(FAMILIES) == names


def test_gguf_rotary_permutation_is_undone():
    path = Path(__file__).parents[2] / "examples" / "quickstart" / "smollm2.py"
    spec = importlib.util.spec_from_file_location("smollm2", path)
    smollm2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smollm2)
    rows = torch.randn(3 * 8, 5)
    llama_cpp = (
        rows.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(rows.shape)
    )  # LlamaModel.permute in convert_hf_to_gguf.py
    assert torch.equal(smollm2.unpermute(llama_cpp, 3), rows)
