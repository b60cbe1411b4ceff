"""Signatures in a wheel of Transformer Engine, of everything that engine_double.py replaces.

    cd tests/support
    pip download --no-deps transformer-engine==2.16.1
    python engine_signatures.py transformer_engine-2.16.1-*.whl > engine_signatures.json

It reads the sources, because the package cannot be imported without CUDA. The functions of the C++
module have no Python signature. For them the table has the number of arguments of the wheel's calls.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
ROOT = "transformer_engine/pytorch/"
DEFINITIONS = {
    "Linear.__init__": "module/linear.py",
    "Linear.forward": "module/linear.py",
    "DotProductAttention.__init__": "attention/dot_product_attention/dot_product_attention.py",
    "DotProductAttention.forward": "attention/dot_product_attention/dot_product_attention.py",
    "FusedAdam.__init__": "optimizers/fused_adam.py",
    "FusedAdam.step": "optimizers/fused_adam.py",
    "apply_rotary_pos_emb": "attention/rope.py",
    "fp8_autocast": "quantization.py",
    "fp8_model_init": "quantization.py",
    "get_cpu_offload_context": "cpu_offload.py",
    "initialize_ub": "module/base.py",
    "destroy_ub": "module/base.py",
}
"""Name in engine_double.py -> file of the wheel."""
CALLS = {
    "rmsnorm_fwd": "ops/basic/rmsnorm.py",
    "rmsnorm_bwd": "ops/basic/rmsnorm.py",
    "layernorm_fwd": "ops/basic/layer_norm.py",
    "layernorm_bwd": "ops/basic/layer_norm.py",
}
"""Function of the C++ module -> file of the wheel that calls it."""


def parameters(source: str, name: str) -> list[str]:
    """Return the parameters of a function or method ("Class.method"), keyword-only ones after "*"."""
    body: list[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        found = [
            node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part
        ]
        body = found[-1].body
    (function,) = found[-1:]
    assert isinstance(function, ast.FunctionDef)
    arguments = function.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    keyword_only = [argument.arg for argument in arguments.kwonlyargs]
    return names + (["*", *keyword_only] if keyword_only else [])


def num_arguments(source: str, function: str) -> int:
    """Return the number of arguments of the only call of a function."""
    (call,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function
    )
    return len(call.args) + len(call.keywords)


def of_wheel(wheel: Path) -> dict[str, list[str] | int]:
    """Return the table of a wheel."""
    with zipfile.ZipFile(wheel) as files:
        read = {path: files.read(ROOT + path).decode() for path in {*DEFINITIONS.values(), *CALLS.values()}}
    table: dict[str, list[str] | int] = {
        name: parameters(read[path], name) for name, path in DEFINITIONS.items()
    }
    return table | {name: num_arguments(read[path], name) for name, path in CALLS.items()}


def of_double() -> dict[str, list[str] | int]:
    """Return the table of engine_double.py."""
    source = Path(__file__).with_name("engine_double.py").read_text()
    table: dict[str, list[str] | int] = {name: parameters(source, name) for name in DEFINITIONS}
    return table | {name: len(parameters(source, name)) for name in CALLS}


if __name__ == "__main__":
    json.dump(of_wheel(Path(sys.argv[1])), sys.stdout, indent=1)
    print()
