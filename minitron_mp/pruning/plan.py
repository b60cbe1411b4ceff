"""Importance scores, and the plan that says what to keep. Runs on a laptop: numpy only, no torchrun.

Width: 2407.14679 section 2.3 (rank, keep the top). Depth: keep layers. Heads are ranked inside each query group and every
kept group keeps as many, so that grouped-query attention stays regular. A query group (its key, value and queries) scores the l2
norm of its heads' scores, as a head does of its channels'; the papers keep all groups.
Scores agree between layouts to rounding only, so ties break by the lower index, and a cut whose gap is inside the rounding
noise is reported by close_cuts() and close_depth().
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from minitron_mp.artifacts.files import write_text
from minitron_mp.artifacts.manifest import Manifest
from minitron_mp.config.pruning import DepthConfig, TargetConfig
from minitron_mp.errors import InputError
from minitron_mp.models.arch import Arch
from minitron_mp.pruning.depth import DepthTrials, close_depth_cuts, kept_layers
from minitron_mp.pruning.ranking import close_width_cuts, kept_heads, merged_heads, top_indices
from minitron_mp.pruning.scores import Scores
from minitron_mp.pruning.target import resolve_target


class PrunePlan(BaseModel):
    """Architecture before and after, and the kept indices, ascending, in the teacher's numbering.

    layers [L'], hidden [h'], ffn [L'][f'], heads [L'][np']: one row for each kept layer. Equal on every rank. The query groups
    that stay are those of the heads that stay. merge [L'][pairs]: (kept head, pruned head whose residual it takes), or empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: Arch
    student: Arch
    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]
    merge: list[list[tuple[int, int]]] = []
    notes: list[str] = []

    @model_validator(mode="after")
    def _fits(self) -> PrunePlan:
        """A plan may be written by hand; slicing relies on every row being ascending and of the student's size."""
        t, s = self.teacher, self.student
        rows = [
            ("layers", self.layers, s.num_layers, t.num_layers),
            ("hidden", self.hidden, s.hidden_size, t.hidden_size),
        ]
        rows += [(f"ffn[{i}]", row, s.ffn_hidden_size, t.ffn_hidden_size) for i, row in enumerate(self.ffn)]
        rows += [
            (f"heads[{i}]", row, s.num_attention_heads, t.num_attention_heads)
            for i, row in enumerate(self.heads)
        ]
        problems = [
            f"{name} has {len(row)} entries, the student {size}"
            for name, row, size, _ in rows
            if len(row) != size
        ]
        problems += [
            f"{name} is not strictly ascending from 0 to {limit - 1}"
            for name, row, _, limit in rows
            if sorted({i for i in row if 0 <= i < limit}) != row
        ]
        parts = [("ffn", self.ffn), ("heads", self.heads)] + [("merge", self.merge)] * bool(self.merge)
        problems += [
            f"{name} has {len(part)} rows for {s.num_layers} layers"
            for name, part in parts
            if len(part) != s.num_layers
        ]
        for i, row in enumerate(self.heads):
            groups = Counter(head // t.heads_per_group for head in row)
            if len(groups) != s.num_query_groups or set(groups.values()) != {s.heads_per_group}:
                problems.append(
                    f"heads[{i}] does not keep {s.heads_per_group} heads in each of {s.num_query_groups} query groups"
                )
        for i, (row, pairs) in enumerate(zip(self.heads, self.merge)):
            alike = all(
                kept in row and pruned not in row and kept // t.heads_per_group == pruned // t.heads_per_group
                for kept, pruned in pairs
            )
            if not alike or len({kept for kept, _ in pairs}) != len(pairs):
                problems.append(
                    f"merge[{i}] is not (kept head, pruned head of the same query group), each kept head at most once"
                )
        if problems:
            raise ValueError("; ".join(problems[:8]))
        return self

    def save(self, path: Path, manifest: Manifest) -> None:
        write_text(
            path, json.dumps({"manifest": manifest.model_dump(mode="json"), **self.model_dump(mode="json")})
        )

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        content = json.loads(path.read_text())
        content.pop("manifest")
        try:
            return cls.model_validate(content)
        except ValueError as error:
            raise InputError(f"{path} is no plan that can be carried out: {error}") from error

    def keep(self, axis: str, layer: int | None = None) -> np.ndarray:
        """Kept units of a weight axis (models.parameters) in a kept layer of the teacher's numbering; int64, ascending."""
        if axis in ("vocab", "head_width"):
            return np.arange(self.teacher.dim_size(axis))
        if axis == "hidden":
            return np.array(self.hidden)
        assert layer is not None
        rows = self.ffn if axis in ("ffn", "gate_up") else self.heads
        return np.array(rows[self.layers.index(layer)])

    def summary(self) -> list[tuple[str, str, str, str]]:
        """Rows (size, teacher, student, kept) for a table."""
        rows = []
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
        ):
            before, after = getattr(self.teacher, name), getattr(self.student, name)
            rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.0%}"))
        for label, embeddings in (("parameters", True), ("non-embedding parameters", False)):
            before, after = (a.num_parameters(embeddings=embeddings) for a in (self.teacher, self.student))
            rows.append((label, f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
        return rows


def make_plan(
    importance: Scores,
    teacher: Arch,
    target: TargetConfig,
    tp: int = 1,
    family: str | None = None,
    depth: DepthConfig | None = None,
    trials: DepthTrials | None = None,
) -> PrunePlan:
    """Rank and keep. tp: the tensor-parallel size that the student must run at, for alignment.

    family: what the student will be exported as, where that limits its sizes. depth, trials: which layers go, where the target does not name
    them; default: those of the least 1 - cosine. InputError lists every reason why the target cannot be.
    """
    importance.check(teacher)
    student, depth = resolve_target(teacher, target, tp, family), depth or DepthConfig()
    layers = kept_layers(importance.layers, teacher.num_layers, student.num_layers, target, depth, trials)
    heads = [kept_heads(importance.heads[i], teacher, student) for i in layers]
    return PrunePlan(
        teacher=teacher,
        student=student,
        layers=layers.tolist(),
        hidden=top_indices(importance.hidden, student.hidden_size).tolist(),
        ffn=[top_indices(importance.ffn[i], student.ffn_hidden_size).tolist() for i in layers],
        heads=heads,
        merge=[merged_heads(importance.heads[i], kept, teacher) for i, kept in zip(layers, heads)]
        if target.merge_heads
        else [],
        notes=close_depth_cuts(
            importance.layers, teacher.num_layers, student.num_layers, target, depth, trials
        )
        + close_width_cuts(importance, teacher, student, layers, merge=target.merge_heads),
    )
