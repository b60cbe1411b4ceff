"""Rules that the source must follow: import order of the rooms, light modules, and import cost."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import minitron_mp
from minitron_mp.models.axes import AXES, AXIS_OF_DIM

PACKAGE = Path(minitron_mp.__file__).parent
ROOMS = [
    "errors",
    "console",
    "losses",
    "config",
    "distributed",
    "models",
    "artifacts",
    "data",
    "distillation",
    "training",
    "evaluation",
    "pruning",
    "report",
    "planning",
    "workflow",
    "cluster",
    "integrations",
    "cli_options",
    "cli_stages",
    "cli",
]
"""Folders and files of the package in the order of imports: each may import those before it."""
TOP = {"__init__", "__main__"}
"""Files that may import every room."""
ONLY_IN = {
    "megatron.core.parallel_state": {"distributed/world", "distributed/cpu_backend"},
    "megatron.core.mpu": set(),
    "megatron.bridge": {"integrations/megatron_bridge"},
    "transformer_engine": {"models/precision", "models/engine_layers"},
    "transformers": {"data/tokenizer", "data/chat_encoder", "integrations/megatron_bridge"},
    "pyarrow": {"data/text_files", "data/records"},
    "triton": {
        "losses/kernels",
        "losses/row_kernels",
        "losses/kernel_calls",
        "pruning/cosine_kernel",
    },
    "lm_eval": {"integrations/lm_eval"},
    "matplotlib": {"report/figures"},
    "jinja2": {"report/document", "data/chat_encoder"},
    "huggingface_hub": {"report/model_card"},
    "wandb": {"training/experiment_trackers"},
    "mlflow": {"training/experiment_trackers"},
    "os.environ": {"distributed/launcher", "distributed/job", "console"},  # the last two import no torch
    "os.getenv": set(),
}
NO_MEGATRON = {
    "errors",
    "console",
    "losses",
    "config",
    "report",
    "planning",
    "cli_options",
    "cli_stages",
    "cli",
}
"""Rooms that do not import Megatron-Core."""
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def used_names(source: str) -> set[str]:
    """Dotted names that a module imports, anywhere in the file, and attributes that it reads."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the room; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(dotted(node))
    return names


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def rooms_of(names: set[str]) -> set[str]:
    """Return this package's rooms in dotted names.

    "from minitron_mp import Recipe" counts as __init__.
    """
    parts = [name.split(".") for name in names if within(name, "minitron_mp")]
    return {part[1] if len(part) > 1 and part[1] in ROOMS else "__init__" for part in parts}


def test_import_forms_are_recognized():
    source = (
        "def f():\n from minitron_mp import cli, Recipe\n import minitron_mp.models.hf_config\n"
        " os.environ['A']\n"
    )
    names = used_names(source)
    assert rooms_of(names) == {"cli", "__init__", "models"}
    assert "os.environ" in names


def test_every_room_is_in_the_order():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - TOP
    assert found == set(ROOMS), "add the new room to ROOMS at its place in the order of imports"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_order_of_rooms(path):
    name = name_of(path)
    room = name.split("/")[0]
    names = used_names(path.read_text())
    if room not in TOP:
        later = rooms_of(names) - set(ROOMS[: ROOMS.index(room) + 1])
        if any(within(used, "minitron_mp.__version__") for used in names):
            later -= {"__init__"}
        assert not later, f"{name} imports {sorted(later)}, which come after {room} in the order of rooms"
    for module, allowed in ONLY_IN.items():
        if any(within(used, module) for used in names):
            assert any(within(name.replace("/", "."), file.replace("/", ".")) for file in allowed), (
                f"{name} uses {module}, which only {sorted(allowed)} may use"
            )
    if room in NO_MEGATRON:
        assert not any(within(used, "megatron") for used in names), f"{name} imports Megatron-Core"


HAVE_PAYLOADS = ("config/", "distillation/", "planning/", "training/", "workflow/")
"""Files in which "hidden" is a payload of the teacher stream."""


def strings(source: str) -> set[str]:
    """String constants of a module."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize(
    "path", [path for path in FILES if not name_of(path).startswith("models/")], ids=name_of
)
def test_axes_are_named_in_their_table_only(path):
    """A new axis is a row of models/axes.py, not another branch in the code that prunes."""
    payloads = {"hidden"} if name_of(path).startswith(HAVE_PAYLOADS) else set()
    named = (strings(path.read_text()) & {*AXES, *AXIS_OF_DIM}) - payloads
    assert not named, f"{name_of(path)} names {sorted(named)}; loop over models.axes.AXES"


@pytest.mark.parametrize("room", [name for name in ROOMS if (PACKAGE / name).is_dir()])
def test_room_names_each_of_its_files(room):
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    modules = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (PACKAGE / room).glob("*/__init__.py")}
    missing = {name for name in modules | packages if not re.search(rf"\b{name}\b", docstring)}
    assert not missing, f"describe {sorted(missing)} in {room}/__init__.py"


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "minitron_mp",
        "minitron_mp.cli",
        "minitron_mp.pruning.plan",
        "minitron_mp.planning.memory",
        "minitron_mp.planning.layouts",
        "minitron_mp.planning.command",
        "minitron_mp.data.corpus",
        "minitron_mp.workflow.run",
        "minitron_mp.workflow.dry_run",
    ],
)
def test_light_modules_do_not_import_torch(module):
    heavy = {"torch", "megatron", "transformers"}
    assert run("-c", f"import sys, {module}; print(*({heavy} & set(sys.modules)))").split() == []


def test_help_is_fast():
    """0.5 s of a CPU when nothing else runs; torch alone takes longer than the bound."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    assert "compress" in run("-m", "minitron_mp", "--help")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2.0
