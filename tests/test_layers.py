"""The house rules that can be read from the source: layers, who may import what, what an import costs."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import minitron_mp

PACKAGE = Path(minitron_mp.__file__).parent
LAYERS = [
    # runs on a laptop
    "errors sections pruning_config training_config config arch hf_config artifact plan cost flops hardware estimate layouts candidates items "
    "environment findings",
    "collectives losses rows kernels fabric machine",  # torch.distributed, groups passed in
    # Megatron-Core. The teacher is here and not with the trainer: evaluate.py compares with its signals.
    "parallel cpu precision model schedule checkpoint optimizer_state hf text data importance ablation slicing masks stream cache states teacher "
    "evaluate speed spans tasks leaving meter profiling",
    "trainer correction",
    "page figures facts card records bought report job drift fit judging stages signals search precheck project pipeline harness planner bridge doctor console "
    "cli __main__ __init__",
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
ONLY_IN = {
    "megatron.core.parallel_state": {"parallel", "cpu"},
    "megatron.core.mpu": set(),
    "megatron.bridge": {"bridge"},
    "transformer_engine": {"precision", "model"},
    "transformers": {"hf", "data", "bridge"},
    "triton": {"kernels"},
    "lm_eval": {"harness"},
    "matplotlib": {"figures"},
    "jinja2": {"page"},
    "huggingface_hub": {"card"},
    "os.environ": {"parallel", "console"},  # console asks for RANK before torch is imported
    "os.getenv": set(),
}
FILES = sorted(PACKAGE.glob("*.py"))


def dotted(node: ast.expr) -> str:
    return (
        f"{dotted(node.value)}.{node.attr}"
        if isinstance(node, ast.Attribute)
        else node.id
        if isinstance(node, ast.Name)
        else "?"
    )


def uses(source: str) -> set[str]:
    """Dotted names that a module imports, wherever in the file, and attributes that it reads."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "minitron_mp" + (f".{node.module}" if node.module else "") if node.level else node.module
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(dotted(node))
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def modules_of_ours(names: set[str]) -> set[str]:
    """Our modules among the dotted names; "from minitron_mp import Recipe" counts as __init__."""
    parts = [name.split(".") for name in names if within(name, "minitron_mp")]
    return {p[1] if len(p) > 1 and p[1] in LAYER else "__init__" for p in parts}


def test_reading_of_imports():
    """The check itself: each way to write an import is seen."""
    found = uses(
        "def f():\n from minitron_mp import cli, Recipe\n import minitron_mp.hf\n from . import plan\n from .arch import Arch\n os.environ['A']\n"
    )
    assert modules_of_ours(found) == {"cli", "__init__", "hf", "plan", "arch"}
    assert "os.environ" in found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layers(path):
    assert path.stem in LAYER, f"{path.name} is new: give it a layer in {Path(__file__).name}"
    names = uses(path.read_text())
    above = sorted(name for name in modules_of_ours(names) if LAYER[name] > LAYER[path.stem])
    assert not above, f"{path.name} (layer {LAYER[path.stem]}) imports {', '.join(above)} of a higher layer"
    for module, allowed in ONLY_IN.items():
        assert path.stem in allowed or not any(within(name, module) for name in names), (
            f"{path.name} uses {module}, which is for {sorted(allowed)} only"
        )
    if LAYER[path.stem] < 2:
        assert not any(within(name, "megatron") for name in names), (
            f"{path.name} (layer {LAYER[path.stem]}) imports megatron, which is for layer 2 and above"
        )


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    ).stdout


@pytest.mark.parametrize(
    "module",
    [
        "minitron_mp",
        "minitron_mp.cli",
        "minitron_mp.plan",
        "minitron_mp.cost",
        "minitron_mp.layouts",
        "minitron_mp.planner",
        "minitron_mp.text",
    ],
)
def test_light_imports(module):
    heavy = {"torch", "megatron", "transformers"}
    assert run("-c", f"import sys, {module}; print(*({heavy} & set(sys.modules)))").split() == []


def test_help_is_quick():
    """0.5 s of a CPU when nothing else runs; torch alone takes longer than the bound."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert "compress" in run("-m", "minitron_mp", "--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2.0


def test_public_names_exist():
    for name in minitron_mp.__all__:
        assert getattr(minitron_mp, name) is not None
    with pytest.raises(AttributeError, match=r"no nothing; public names: .*Recipe"):
        _ = minitron_mp.nothing
