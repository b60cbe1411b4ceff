"""Results that several tests share. Each is computed on first use and kept for the session.

A failed computation is reported in full by the first test that needs it. Later tests fail with one
line that names this test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import reference
from cases import (
    ARCHS,
    BLOCKS,
    BY_NAME,
    CASES,
    CHOICES,
    DISTILL,
    GLOBAL_BATCH_SIZE,
    GONE,
    GONE_LAYOUTS,
    MEANWHILE,
    RESUME_AT,
    STEPS,
    TASK_CANDIDATES,
    TRAINED,
    UNEVEN,
    WORDS,
    Layout,
    make_samples,
    make_weights,
    masked_axes,
    pairs,
    saved_axes,
    variants,
)
from torch import Tensor

ONE = BY_NAME["one"]


class SharedResultError(AssertionError):
    """A computation failed whose result several tests share; its cause is the first error."""


class Results:
    """Results of a session. arch: a name of cases.ARCHS."""

    def __init__(self, ranks: Callable[..., list[Any]], root: Path):
        self.ranks = ranks
        self.root = root
        self.computed: dict[Hashable, Any] = {}
        self.failed_in: dict[Hashable, str] = {}  # key -> test that saw the error

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return compute() of the first call with this key.

        If it raised, the first call raises SharedResultError from that error. Later calls fail the
        test with one line.
        """
        if key in self.failed_in:
            pytest.fail(f"shared computation {named(key)} failed; see {self.failed_in[key]}", pytrace=False)
        if key not in self.computed:
            try:
                self.computed[key] = compute()
            except Exception as error:
                self.failed_in[key] = os.environ.get("PYTEST_CURRENT_TEST", "its first use").split(" (")[0]
                raise SharedResultError(f"shared computation {named(key)} failed") from error
        return self.computed[key]

    def weights(self, arch: str) -> dict[str, Tensor]:
        return self.once(("weights", arch), lambda: make_weights(ARCHS[arch]))

    def teacher(self, arch: str) -> Path:
        """Return a checkpoint of these weights."""

        def write() -> Path:
            folder = self.root / arch / "teacher"
            self.ranks(
                1, "model_workers.write_weights", folder=folder, arch=ARCHS[arch], weights=self.weights(arch)
            )
            return folder

        return self.once(("teacher", arch), write)

    def pruned(self, arch: str, layout: Layout) -> list[dict[str, Any]]:
        """Return model_workers.prune_everything by rank; student() has the saved students."""
        case = {
            "layout": layout,
            "arch": ARCHS[arch],
            "save": saved_axes(arch),
            "masks": masked_axes(arch, layout),
            "pairs": pairs(arch, layout),
            "uneven": (arch, layout) in UNEVEN,
        }
        case["output"] = self.root / arch / "pruned" / layout.name
        return self.once(
            ("pruned", arch, layout),
            lambda: self.ranks(
                layout.ranks, "model_workers.prune_everything", teacher=self.teacher(arch), **case
            ),
        )

    def plan(self, arch: str, axis: str, layout: Layout = ONE) -> Any:
        return self.pruned(arch, layout)[0]["plans"][axis]

    def student(self, arch: str, axis: str, layout: Layout = ONE) -> tuple[Any, Path]:
        """Return architecture and checkpoint of the student that a layout made."""
        return self.plan(arch, axis, layout).student, self.root / arch / "pruned" / layout.name / axis

    def dense(self, arch: str, plan: Any = None, *, masked: bool = False) -> Tensor:
        """Return the reference's logits of the samples of step 0.

        Without a plan they are the teacher's, with a plan the student's, with `masked` those of the
        teacher under the plan's masks.
        """

        def compute() -> Tensor:
            weights, tokens = self.weights(arch), make_samples(ARCHS[arch], 0, 8)["tokens"]
            if plan is None:
                return reference.logits(ARCHS[arch], weights, tokens)
            if masked:
                masked_weights, hidden = reference.masked_teacher(ARCHS[arch], weights, plan)
                return reference.logits(ARCHS[arch], masked_weights, tokens, hidden)
            return reference.logits(plan.student, reference.sliced(ARCHS[arch], weights, plan), tokens)

        return self.once(("dense", arch, plan and plan.model_dump_json(), masked), compute)

    def task_files(self) -> Path:
        """Return a folder with choices.jsonl and words.jsonl."""

        def write() -> Path:
            folder = self.root / "tasks"
            folder.mkdir()
            for name, rows in (("choices", CHOICES), ("words", WORDS)):
                (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return folder

        return self.once(("tasks",), write)

    def judged(self, layout: Layout) -> list[dict[str, Any]]:
        """Return model_workers.judge_everything for qwen3 by rank."""
        missing = {frozenset(): BLOCKS}
        if layout.name in GONE_LAYOUTS:
            missing[GONE] = [block | GONE for block in BLOCKS]
        case = {
            "layout": layout,
            "arch": ARCHS["qwen3"],
            "teacher": self.teacher("qwen3"),
            "files": self.task_files(),
        }
        case |= {"missing": missing, "gone": GONE, "candidates": TASK_CANDIDATES}
        return self.once(
            ("judged", layout), lambda: self.ranks(layout.ranks, "model_workers.judge_everything", **case)
        )

    def loaded(self, arch: str, layout: Layout) -> list[dict[str, Tensor | None]]:
        """Return axis -> logits by rank, of students that the previous layout in the table made."""
        source = previous(CASES, arch, layout)

        def load() -> list[Any]:
            models = {axis: self.student(arch, axis, source) for axis in saved_axes(arch)}
            return self.ranks(layout.ranks, "model_workers.load_and_run", layout=layout, models=models)

        return self.once(("loaded", arch, layout), load)

    def loaded_uneven(self, arch: str, layout: Layout) -> list[dict[str, Tensor | None]]:
        """Logits of the student whose layers differ in size, that the previous layout of UNEVEN cut."""
        models = {"uneven": self.student(arch, "uneven", previous(UNEVEN, arch, layout))}
        return self.once(
            ("loaded uneven", arch, layout),
            lambda: self.ranks(layout.ranks, "model_workers.load_and_run", layout=layout, models=models),
        )

    def trained(self, arch: str, layout: Layout) -> list[dict[str, Any]]:
        """Return training_workers.train_everything by rank, for one rank's student of all axes."""
        output = self.root / arch / "trained" / layout.name
        return self.once(
            ("trained", arch, layout),
            lambda: self.ranks(
                layout.ranks,
                "training_workers.train_everything",
                output=output,
                **self._training(arch, layout),
            ),
        )

    def variants(self, layout: Layout) -> list[dict[str, Any]]:
        """Return training_workers.train_variants of cases.variants() for qwen3 by rank."""
        case = {"output": self.root / "variants" / layout.name, "variants": variants(layout)}
        return self.once(
            ("variants", layout),
            lambda: self.ranks(
                layout.ranks, "training_workers.train_variants", **case, **self._training("qwen3", layout)
            ),
        )

    def corrected_meanwhile(self, layout: Layout, precision: str = "fp32") -> list[dict[str, Any]]:
        """Return training_workers.correct_meanwhile for qwen3 by rank."""
        case = {
            "output": self.root / "meanwhile" / layout.name / precision,
            "correct": MEANWHILE,
            "precision": precision,
            **self._training("qwen3", layout),
        }
        return self.once(
            ("meanwhile", layout, precision),
            lambda: self.ranks(layout.ranks, "training_workers.correct_meanwhile", **case),
        )

    def streamed(self, payload: str, layout: Layout, teacher: Layout | None, window: int = 3) -> list[Any]:
        """Return the steps of trained("qwen3") with a remote teacher.

        teacher: its layout; None is a colocated teacher that hands over this payload.
        """
        name = f"{payload}-{layout.name}-{teacher and teacher.name}-{window}"
        models = self._training("qwen3", layout)
        case = {"student": models["layout"], "arch": models["arch"], "weights": models["teacher"]}
        case |= {
            "student_arch": models["student_arch"],
            "student_weights": models["student"],
            "output": self.root / "streamed" / name,
        }
        size = layout.ranks + (teacher.ranks if teacher else 0)
        case |= {"payload": payload, "teacher": teacher, "window": window}
        return self.once(
            ("streamed", name),
            lambda: self.ranks(size, "teacher_stream_workers.train_with", **case)[0],
        )

    def _training(self, arch: str, layout: Layout) -> dict[str, Any]:
        student_arch, student = self.student(arch, "all")
        return {
            "layout": layout,
            "arch": ARCHS[arch],
            "teacher": self.teacher(arch),
            "student_arch": student_arch,
            "student": student,
        }

    def stopped(self, arch: str, layout: Layout) -> Path:
        """Return the folder with the checkpoint after RESUME_AT steps."""
        self.trained(arch, layout)
        return self.root / arch / "trained" / layout.name / "unbroken"

    def resumed(self, arch: str, layout: Layout) -> list[Any]:
        """Return the steps after RESUME_AT, resumed from the checkpoint of the previous layout."""
        source = previous(TRAINED, arch, layout)

        def resume() -> list[Any]:
            models = {
                "arch": ARCHS[arch],
                "teacher": self.teacher(arch),
                "student_arch": self.student(arch, "all")[0],
            }
            folders = {
                "stopped": self.stopped(arch, source),
                "output": self.root / arch / "resumed" / layout.name,
            }
            return self.ranks(layout.ranks, "training_workers.resume", layout=layout, **models, **folders)[0]

        return self.once(("resumed", arch, layout), resume)

    def plain_training(self, arch: str) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
        """Return (loss, kl, ce, gradient norm) of every step, and the state after RESUME_AT steps.

        The state has checkpoint keys.
        """

        def train() -> Any:
            plan, state = self.plan(arch, "all"), {}
            student = reference.sliced(ARCHS[arch], self.weights(arch), plan)
            run = reference.PlainTraining(ARCHS[arch], self.weights(arch), plan.student, student, DISTILL)
            for step, metrics in enumerate(self.trained(arch, ONE)[0]["unbroken"]):
                run.step(make_samples(ARCHS[arch], step, GLOBAL_BATCH_SIZE), metrics.lr)
                if step + 1 == RESUME_AT:
                    state = {
                        f"optimizer.param.{key}": value.detach().clone() for key, value in run.weights.items()
                    }
                    for i, part in enumerate(("exp_avg", "exp_avg_sq")):
                        state |= {
                            f"optimizer.{part}.{key}": moments[i].clone()
                            for key, moments in run.moments.items()
                        }
            assert len(run.history) == STEPS
            return run.history, state

        return self.once(("plain", arch), train)


def previous(table: list[tuple[str, Layout]], arch: str, layout: Layout) -> Layout:
    """Return the previous layout of the architecture in a table; before the first is the last."""
    layouts = [row_layout for name, row_layout in table if name == arch]
    return layouts[layouts.index(layout) - 1]


def named(key: Hashable) -> str:
    """Return a short name of a result."""
    parts = key if isinstance(key, tuple) else (key,)
    return " ".join(getattr(part, "name", str(part))[:40] for part in parts)
