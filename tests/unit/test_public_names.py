"""The names of `import minitron_mp as mm`: they exist, and type checkers see their types."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

import minitron_mp
from minitron_mp.integrations import megatron_bridge

PROGRAM = """
from pathlib import Path
import minitron_mp as mm

settings = mm.DistillConfig(steps=4, warmup_steps=1)
correction = mm.CorrectionConfig(steps=4, warmup_steps=1)

def batches(step: int) -> list[mm.Batch]:
    return []

def on_step(metrics: mm.StepMetrics) -> None:
    print(metrics.loss)

with mm.join_world(mm.ParallelConfig(tp=2), seed=1) as world:
    teacher = mm.load_model("teacher", world, sequence_length=128)
    plan = mm.make_plan(mm.score(teacher, [batches(0)]), teacher.arch, mm.TargetConfig(keep=0.75))
    student = mm.load_model(Path("student"), world, sequence_length=128, training=settings)
    mm.train(teacher, None, batches, correction, checkpoints="checkpoints", on_step=on_step)
    mm.distill(student, mm.ColocatedTeacher(teacher), batches, settings, out="distilled")
    objective = mm.Objective("js", ce_weight=0.5)
    reveal_type(plan)
    reveal_type(mm.evaluate(student, batches(0)))
    mm.load_model("teacher", "world", sequence_length=128)
    mm.nothing
"""
EXPECTED = [
    'Revealed type is "minitron_mp.pruning.plan.PrunePlan"',
    'Revealed type is "minitron_mp.evaluation.quality.Quality"',
    'Argument 2 to "load_model" has incompatible type "str"; expected "World"',
    'Module has no attribute "nothing"',
]
MYPY = """
[mypy]
ignore_missing_imports = true
[mypy-torch.*,transformers.*]
follow_imports = skip
"""
"""Settings of a user without the pydantic plugin. Reading torch and transformers takes half a minute."""


def test_public_names_exist():
    for name in minitron_mp.__all__:
        assert getattr(minitron_mp, name) is not None
    with pytest.raises(AttributeError, match=r"no nothing; public names: .*Recipe"):
        _ = minitron_mp.nothing


def test_bridge_names_exist():
    """Also without Megatron-Bridge, which each function imports itself."""
    for name in megatron_bridge.__all__:
        assert getattr(megatron_bridge, name) is not None
    assert megatron_bridge.Objective is minitron_mp.Objective
    with pytest.raises(AttributeError, match=r"has no nothing; public names: .*Objective"):
        _ = megatron_bridge.nothing


def test_objective_and_targets_of_the_loss_are_public():
    assert {"Objective", "TeacherHidden", "TeacherLogits", "TeacherTopK"} <= {*minitron_mp.__all__}
    assert "RemoteTeacher" not in minitron_mp.__all__  # its parts are not public


def test_type_checkers_see_every_public_name():
    """The table for the interpreter and the imports for type checkers have the same names."""
    tree = ast.parse(Path(minitron_mp.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.asname: node.module.removeprefix("minitron_mp.") for node in block.body for alias in node.names
    }
    assert imported == minitron_mp._MODULE_OF


def test_docstring_lists_every_public_name():
    docstring = minitron_mp.__doc__.replace(",", " ").split()
    assert {*minitron_mp.__all__} - {*docstring} == {"__version__"}


def test_marker_of_types_is_packaged():
    assert '"minitron_mp": ["py.typed"]' in (ROOT / "setup.py").read_text()
    assert (ROOT / "minitron_mp" / "py.typed").is_file()


@pytest.mark.slow
def test_mypy_reads_the_types_of_public_names(tmp_path):
    program, settings = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM)
    settings.write_text(MYPY)
    words = ["--config-file", str(settings), "--no-pretty", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, str(program), str(ROOT / "examples" / "library.py")],
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(ROOT)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(str(program))]
    assert len(lines) == len(EXPECTED), done.stdout + done.stderr
    for line, expected in zip(lines, EXPECTED):
        assert expected in line
    assert "library.py:" not in done.stdout
