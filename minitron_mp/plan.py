"""Importance scores, and the plan that says what to keep. Runs on a laptop: numpy only, no torchrun.

Width: 2407.14679 section 2.3 (rank, keep the top). Depth: keep layers. Heads are ranked inside each query group and every
kept group keeps as many, so that grouped-query attention stays regular. A query group (its key, value and queries) scores the l2
norm of its heads' scores, as a head does of its channels'; the papers keep all groups.
Scores agree between layouts to rounding only, so ties break by the lower index, and a cut whose gap is inside the rounding
noise is reported by close_cuts() and close_depth().
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from minitron_mp.arch import Arch, export_problems, layout_problems
from minitron_mp.artifact import Manifest, read_json, write_bytes, write_text
from minitron_mp.errors import InputError, refuse
from minitron_mp.pruning_config import Depth, Target

NOISE = 1e-5
"""Relative gap at a cut under which float32 sums over another number of ranks may order two scores the other way."""


@dataclass(frozen=True)
class Importance:
    """Scores, float32 on the CPU, under global numbering: the same on every rank.

    ffn [L, f], heads [L, np], hidden [h], layers [L] (1 - cosine of input and output, mean over tokens).
    """

    ffn: np.ndarray
    heads: np.ndarray
    hidden: np.ndarray
    layers: np.ndarray

    def save(self, path: Path, manifest: Manifest) -> None:
        from safetensors.numpy import save

        tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in vars(self).items()}
        write_bytes(path, save(tensors, metadata={"manifest": manifest.model_dump_json()}))

    @classmethod
    def load(cls, path: Path) -> Importance:
        from safetensors.numpy import load_file

        tensors = load_file(path)
        fields = set(cls.__dataclass_fields__)
        if set(tensors) != fields:
            raise InputError(
                f"{path} holds {', '.join(sorted(tensors))}, not {', '.join(sorted(fields))}; run `minitron-mp score --force` again"
            )
        return cls(**tensors)

    def check(self, arch: Arch) -> None:
        """InputError unless shapes fit the architecture and every score is finite."""
        shapes = {
            "ffn": (arch.num_layers, arch.ffn_hidden_size),
            "heads": (arch.num_layers, arch.num_attention_heads),
            "hidden": (arch.hidden_size,),
            "layers": (arch.num_layers,),
        }
        problems = [
            f"{name} has shape {getattr(self, name).shape}, the model needs {shape}"
            for name, shape in shapes.items()
            if getattr(self, name).shape != shape
        ]
        problems += [
            f"{name} holds a NaN or an infinity"
            for name in shapes
            if not np.isfinite(getattr(self, name)).all()
        ]
        refuse("these importance scores do not fit the model:", problems)


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
        """Kept units of a weight axis (arch.AXES) in a kept layer of the teacher's numbering; int64, ascending."""
        if axis in ("vocab", "head_width"):
            return np.arange(self.teacher.axis_size(axis))
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
    importance: Importance,
    teacher: Arch,
    target: Target,
    tp: int = 1,
    family: str | None = None,
    depth: Depth | None = None,
    trials: Trials | None = None,
) -> PrunePlan:
    """Rank and keep. tp: the tensor-parallel size that the student must run at, for alignment.

    family: what the student will be exported as, where that limits its sizes. depth, trials: which layers go, where the target does not name
    them; default: those of the least 1 - cosine. InputError lists every reason why the target cannot be.
    """
    importance.check(teacher)
    student, depth = resolve_target(teacher, target, tp, family), depth or Depth()
    layers = kept_layers(importance.layers, teacher.num_layers, student.num_layers, target, depth, trials)
    heads = [kept_heads(importance.heads[i], teacher, student) for i in layers]
    return PrunePlan(
        teacher=teacher,
        student=student,
        layers=layers.tolist(),
        hidden=top(importance.hidden, student.hidden_size).tolist(),
        ffn=[top(importance.ffn[i], student.ffn_hidden_size).tolist() for i in layers],
        heads=heads,
        merge=[merged_heads(importance.heads[i], kept, teacher) for i, kept in zip(layers, heads)]
        if target.merge_heads
        else [],
        notes=close_depth(importance.layers, teacher.num_layers, student.num_layers, target, depth, trials)
        + close_cuts(importance, teacher, student, layers, merge=target.merge_heads),
    )


def top(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the count largest scores [n], ascending; a tie goes to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def kept_groups(scores: np.ndarray, teacher: Arch, student: Arch) -> np.ndarray:
    """Query groups that stay, ascending, by the scores of a layer's heads [np]."""
    return top(np.linalg.norm(scores.reshape(teacher.num_query_groups, -1), axis=1), student.num_query_groups)


def kept_heads(scores: np.ndarray, teacher: Arch, student: Arch) -> list[int]:
    """Heads that stay, ascending: the best of each kept group, by the scores of a layer's heads [np]."""
    groups = scores.reshape(teacher.num_query_groups, -1)
    return [
        int(g * teacher.heads_per_group + h)
        for g in kept_groups(scores, teacher, student)
        for h in top(groups[g], student.heads_per_group)
    ]


def merged_heads(scores: np.ndarray, kept: list[int], teacher: Arch) -> list[tuple[int, int]]:
    """(kept head, pruned head whose residual it takes) in each kept group, mirrored at the cut, by a layer's scores [np].

    2407.14679 section 2.3: with L heads in the order of importance cut to K, head i becomes head_i + (head_i - head_{2K-i+1}) for
    i in [K-(L-K), K]: the last kept takes the first pruned, the one before it the second. The paper's first i names head L+1,
    which is none, so it begins one later; with more pruned than kept heads it begins at 1, and the weakest are lost. The paper does
    this only to queries under grouped-query attention, and so do we: the key and value of a group are still whole.
    """
    pairs: list[tuple[int, int]] = []
    for group in sorted({head // teacher.heads_per_group for head in kept}):
        members = np.arange(teacher.heads_per_group) + group * teacher.heads_per_group
        ranked = members[np.argsort(-scores[members], kind="stable")].tolist()
        count = len(set(ranked) & set(kept))
        pairs += zip(ranked[:count][::-1], ranked[count:])
    return pairs


class Trials(BaseModel):
    """The stage `depth`: losses without some layers. base: with all. trials: (layers left out, loss).

    Losses are cross-entropies on text, in nats a token; or, with the metric task, means of -log p of the right options, in nats an
    item, and then accuracies has the share of items that is right in each trial. greedy: one trial a round, each with the layers of
    the one before and one more; second has the next best of each round, but of a last one that had no other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: float
    trials: list[tuple[list[int], float]]
    base_accuracy: float | None = None
    accuracies: list[float] = []
    second: list[tuple[list[int], float]] = []
    second_accuracies: list[float] = []

    def ranked(self) -> list[int]:
        """Numbers of the trials, the best one first: by accuracy where there is one, then by loss, then in order."""
        return sorted(
            range(len(self.trials)),
            key=lambda i: (-self.accuracies[i] if self.accuracies else 0.0, self.trials[i][1]),
        )

    def save(self, path: Path, manifest: Manifest) -> None:
        write_text(
            path, json.dumps({"manifest": manifest.model_dump(mode="json"), **self.model_dump()}, indent=1)
        )

    @classmethod
    def load(cls, path: Path) -> Trials:
        content = read_json(path, "depth --force")
        return cls.model_validate({name: value for name, value in content.items() if name != "manifest"})


def droppable(depth: Depth, num_layers: int, count: int) -> list[int]:
    """Layers that are not protected; InputError when they are fewer than `count`, which are to go."""
    free = list(range(depth.protect_first, num_layers - depth.protect_last))
    if count > len(free):
        raise InputError(
            f"depth.protect_first {depth.protect_first} and protect_last {depth.protect_last} leave {len(free)} of {num_layers} layers that may go, "
            f"the target drops {count}; protect fewer, or keep more layers"
        )
    return free


def depth_candidates(
    depth: Depth, num_layers: int, count: int, gone: Collection[int] = ()
) -> list[frozenset[int]]:
    """What the stage `depth` measures: sets of layers to leave out. gone: those that a greedy search has dropped already."""
    free = droppable(depth, num_layers, count)
    if depth.method == "block":
        return [frozenset(range(first, first + count)) for first in free[: len(free) - count + 1]]
    return [frozenset({*gone, layer}) for layer in free if layer not in gone]


def kept_layers(
    cosine: np.ndarray, num_layers: int, keep: int, target: Target, depth: Depth, trials: Trials | None
) -> np.ndarray:
    """Layers of the student, ascending; a tie goes to the lower layer."""
    count = num_layers - keep
    if target.drop_layers is not None or count == 0:
        dropped = np.array(target.drop_layers or [], int)
    elif depth.method == "cosine":
        free = np.array(droppable(depth, num_layers, count))
        dropped = np.setdiff1d(free, free[top(cosine[free], len(free) - count)])
    else:
        assert trials is not None, "run the stage depth first"
        ranked = trials.ranked()
        if depth.method == "drop":
            dropped = np.array([trials.trials[i][0][0] for i in ranked[:count]])
        else:
            dropped = np.array(trials.trials[ranked[0] if depth.method == "block" else count - 1][0])
    return np.setdiff1d(np.arange(num_layers), dropped)


def close_depth(
    cosine: np.ndarray, num_layers: int, keep: int, target: Target, depth: Depth, trials: Trials | None
) -> list[str]:
    """One sentence for each choice of kept_layers() between two scores, or two trials, nearer than the rounding noise; among the layers that may go."""
    count = num_layers - keep
    if target.drop_layers is not None or count == 0:
        return []
    if depth.method == "cosine":
        free = droppable(depth, num_layers, count)
        return _close_scores("layers", cosine[free][None], len(free) - count)
    assert trials is not None, "run the stage depth first"
    found, second = (
        list(zip(tried, shares or [1.0] * len(tried)))
        for tried, shares in ((trials.trials, trials.accuracies), (trials.second, trials.second_accuracies))
    )
    if depth.method == "greedy":
        pairs = list(zip(found, second))[:count]
    else:
        ranked, last = [found[i] for i in trials.ranked()], 1 if depth.method == "block" else count
        pairs = list(zip(ranked[last - 1 : last], ranked[last : last + 1]))
    notes = []
    for ((chosen, loss), share), ((other, other_loss), other_share) in pairs:
        if share == other_share and abs(loss - other_loss) <= NOISE * max(abs(loss), abs(other_loss)):
            alike = f"the accuracy is {share:.1%}, and " if trials.accuracies else ""
            without = f"without {', '.join(map(str, chosen))} (chosen) and without {', '.join(map(str, other))} (next best)"
            notes.append(
                f"layers: {without} {alike}the losses are {loss:.9g} and {other_loss:.9g}, nearer than rounding"
            )
    return notes


def close_cuts(
    importance: Importance, teacher: Arch, student: Arch, layers: np.ndarray, *, merge: bool
) -> list[str]:
    """One sentence for each cut of a width between two scores nearer than the rounding noise. layers: that stay. merge: the order of heads counts."""
    notes = _close_scores("hidden", importance.hidden[None], student.hidden_size)
    for i in layers:
        groups = importance.heads[i].reshape(teacher.num_query_groups, -1)
        kept = groups[kept_groups(importance.heads[i], teacher, student)]
        notes += _close_scores(f"ffn of layer {i}", importance.ffn[i][None], student.ffn_hidden_size)
        notes += _close_scores(
            f"query groups of layer {i}", np.linalg.norm(groups, axis=1)[None], student.num_query_groups
        )
        notes += _close_scores(f"heads of layer {i}", kept, student.heads_per_group, merge=merge)
    return notes


def _close_scores(name: str, scores: np.ndarray, count: int, *, merge: bool = False) -> list[str]:
    """Of rows of scores [rows, n], of which the count largest stay."""
    if count == scores.shape[1]:
        return []
    notes, ordered = [], -np.sort(-scores.astype(np.float64), axis=1)
    close = ordered[:, :-1] - ordered[:, 1:] <= NOISE * np.abs(ordered[:, :-1])
    for row, at in np.argwhere(close):
        pair = f"{ordered[row, at]:.9g} and {ordered[row, at + 1]:.9g}, nearer than rounding"
        if at == count - 1:
            notes.append(f"{name}: the last kept and first cut score are {pair}")
        elif merge and abs(at - (count - 1)) <= min(count, scores.shape[1] - count):
            notes.append(f"{name}: two scores whose order says what is merged are {pair}")
    return notes


def resolve_target(teacher: Arch, target: Target, tp: int = 1, family: str | None = None) -> Arch:
    """The student's architecture; InputError with every problem and the nearest sizes that work."""
    if target.max_parameters is not None:
        student = _largest(teacher, target, tp, target.max_parameters, family)
    elif target.keep is not None:
        student = _largest(teacher, target, tp, target.keep * teacher.num_parameters(), family)
    else:
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        student = teacher.model_copy(update={n: v for n in names if (v := getattr(target, n))})
        if target.drop_layers:
            student = student.model_copy(update={"num_layers": teacher.num_layers - len(target.drop_layers)})
        if target.num_query_groups and not target.num_attention_heads:
            student = student.model_copy(
                update={"num_attention_heads": target.num_query_groups * teacher.heads_per_group}
            )
    refuse("this target cannot be:", _target_problems(teacher, student, target, tp))
    return student


def _target_problems(teacher: Arch, student: Arch, target: Target, tp: int) -> list[str]:
    problems = [
        f"drop_layers names layer {n}, the model has 0 to {teacher.num_layers - 1}"
        for n in target.drop_layers or []
        if n >= teacher.num_layers
    ]
    if target.drop_layers and len(target.drop_layers) >= teacher.num_layers:
        problems.append("drop_layers names every layer")
    for name, step, why in (
        ("num_layers", 1, ""),
        ("hidden_size", target.align, f"align {target.align}"),
        ("ffn_hidden_size", target.align * tp, f"align {target.align}" + f" x tp {tp}" * (tp > 1)),
        ("num_query_groups", tp, f"tp {tp}"),
        ("num_attention_heads", student.num_query_groups, "the query groups"),
    ):
        before, after = getattr(teacher, name), getattr(student, name)
        if after > before:
            problems.append(f"{name} {after} is larger than the teacher's {before}")
        elif after != before and after % step:
            near = [n for n in (after // step * step, (after // step + 1) * step) if 0 < n <= before]
            other = ", or cut num_query_groups too" if name == "num_attention_heads" else ""
            problems.append(
                f"{name} {after} is no multiple of {step} ({why}); nearest that work: {' or '.join(map(str, near)) or 'none'}{other}"
            )
    heads, groups = student.num_attention_heads, student.num_query_groups
    if not problems and student.heads_per_group > teacher.heads_per_group:
        limit = groups * teacher.heads_per_group
        problems.append(
            f"num_attention_heads {heads} in {groups} query groups are more a group than the teacher's {teacher.heads_per_group}; at most {limit}"
        )
    if not problems and target.merge_heads and student.heads_per_group == teacher.heads_per_group:
        problems.append(
            f"merge_heads: each query group that stays keeps its {teacher.heads_per_group} heads, so there is nothing to merge; "
            "drop it, or give fewer num_attention_heads"
        )
    if not problems:
        problems = layout_problems(student, tp)
    return problems


def _largest(teacher: Arch, target: Target, tp: int, budget: float, family: str | None) -> Arch:
    """The student of at most budget parameters: all layers it affords, or the width scaled most evenly.

    Only hidden sizes that can be exported as the family (default: the teacher's).
    """
    if budget > teacher.num_parameters():
        raise InputError(
            f"target.max_parameters {budget:,.0f} is more than the teacher's {teacher.num_parameters():,}; nothing would be cut"
        )
    if set(target.axes) == {"layer"}:
        candidates = [teacher.model_copy(update={"num_layers": n}) for n in range(teacher.num_layers, 0, -1)]
        fitting = [c for c in candidates if c.num_parameters() <= budget][:1]
    elif set(target.axes) <= {"hidden", "ffn"}:
        hidden = (
            steps_down(teacher.hidden_size, target.align)
            if "hidden" in target.axes
            else [teacher.hidden_size]
        )
        ffn = (
            steps_down(teacher.ffn_hidden_size, target.align * tp)
            if "ffn" in target.axes
            else [teacher.ffn_hidden_size]
        )

        def wide(h: int, f: int) -> Arch:
            return teacher.model_copy(update={"hidden_size": h, "ffn_hidden_size": f})

        hidden = [
            h
            for h in hidden
            if not export_problems(
                wide(h, teacher.ffn_hidden_size).model_copy(update={"family": family or teacher.family})
            )
        ]
        first = [bisect_left(ffn, -budget, key=lambda f: -wide(h, f).num_parameters()) for h in hidden]
        fitting = [wide(h, ffn[i]) for h, i in zip(hidden, first) if i < len(ffn)]
        # Scale both axes alike; of two equally even ones the larger.
        fitting.sort(
            key=lambda a: (
                abs(a.hidden_size / teacher.hidden_size - a.ffn_hidden_size / teacher.ffn_hidden_size),
                -a.num_parameters(),
            )
        )
    else:
        raise InputError(
            f"target.axes {target.axes} mixes width and depth; give hidden and ffn, or layer, or explicit sizes for both"
        )
    if not fitting:
        raise InputError(
            f"no student along {target.axes} has at most {budget:,.0f} parameters; the embeddings alone may be larger: cut hidden too, or ask for more"
        )
    return fitting[0]


def steps_down(size: int, step: int) -> list[int]:
    """size, then the multiples of step below it, falling."""
    return [size, *range((size - 1) // step * step, 0, -step)]


def exportable(student: Arch, family: str | None) -> Arch:
    """The architecture under the family that it is exported as; InputError when transformers would refuse it."""
    if family and family != student.family and (student.family, family) != ("llama", "mistral"):
        raise InputError(
            f"export.family {family}: a {student.family} can be written as itself only (a llama as mistral, too)"
        )
    if family == "mistral" and student.family == "llama" and student.rope_scaling_factor:
        raise InputError(
            "export.family mistral: this Llama scales its rotary frequencies, which Mistral's configuration cannot say"
        )
    student = student.model_copy(update={"family": family or student.family})
    refuse("the student cannot be exported:", export_problems(student))
    return student
