"""Importance scores, and the plan that says what to keep. Runs on a laptop: numpy only, no torchrun.

Width: 2407.14679 section 2.3 (rank, keep the top). Depth: keep layers. Heads are ranked inside each query group and every
kept group keeps as many, so that grouped-query attention stays regular. A query group (its key, value and queries) scores the l2
norm of its heads' scores, as a head does of its channels'; the papers keep all groups.
Scores agree between layouts to rounding only, so ties break by the lower index, and a cut whose gap is inside the rounding
noise is reported by close_cuts() and close_depth().
"""

from __future__ import annotations

from bisect import bisect_left

from minitron_mp.config.pruning import TargetConfig
from minitron_mp.errors import InputError, refuse
from minitron_mp.models.arch import Arch, layout_problems
from minitron_mp.models.families.export import export_problems


def resolve_target(teacher: Arch, target: TargetConfig, tp: int = 1, family: str | None = None) -> Arch:
    """The student's architecture; InputError with every problem and the nearest sizes that work."""
    if target.max_parameters is not None:
        student = _largest(teacher, target, tp, target.max_parameters, family)
    elif target.keep is not None:
        student = _largest(teacher, target, tp, target.keep * teacher.num_parameters(), family)
    else:
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        student = teacher.resized(**{name: getattr(target, name) for name in names if getattr(target, name)})
        if target.drop_layers:
            student = student.resized(num_layers=teacher.num_layers - len(target.drop_layers))
        if target.num_query_groups and not target.num_attention_heads:
            student = student.resized(num_attention_heads=target.num_query_groups * teacher.heads_per_group)
    refuse("this target cannot be:", _target_problems(teacher, student, target, tp))
    return student


def _target_problems(teacher: Arch, student: Arch, target: TargetConfig, tp: int) -> list[str]:
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


def _largest(teacher: Arch, target: TargetConfig, tp: int, budget: float, family: str | None) -> Arch:
    """The student of at most budget parameters: all layers it affords, or the width scaled most evenly.

    Only hidden sizes that can be exported as the family (default: the teacher's).
    """
    if budget > teacher.num_parameters():
        raise InputError(
            f"target.max_parameters {budget:,.0f} is more than the teacher's {teacher.num_parameters():,}; nothing would be cut"
        )
    if set(target.axes) == {"layer"}:
        candidates = [teacher.resized(num_layers=n) for n in range(teacher.num_layers, 0, -1)]
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
            return teacher.resized(hidden_size=h, ffn_hidden_size=f)

        hidden = [h for h in hidden if not export_problems(wide(h, teacher.ffn_hidden_size), family)]
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
