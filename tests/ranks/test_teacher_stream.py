"""The teacher stream: the transfer plan as pure functions, both ends over gloo, and failures."""

from __future__ import annotations

import itertools
import math
import re
import time
from dataclasses import replace

import pytest
import torch
from cases import ARCHS, BY_NAME, RESUME_AT, Layout
from pool import Pool, RankError
from teacher_stream_workers import local_signal, order_of_work

from minitron_mp.config.parallel import ParallelConfig
from minitron_mp.config.recipe import make_recipe
from minitron_mp.distillation.stream import Link
from minitron_mp.distillation.stream_layout import Grid, StreamShape, messages
from minitron_mp.errors import differing_fields
from minitron_mp.planning.memory import payload_bytes_per_token
from minitron_mp.workflow.teacher_stream import stream_settings

SP = {"sequence_parallel": True}
HIDDEN = StreamShape("hidden", 24, 2, 6, torch.float32)
LOGITS = StreamShape("logits", 24, 2, 8, torch.bfloat16)
TOPK = StreamShape("topk", 24, 2, 7, torch.float32)
ODD = StreamShape("hidden", 6, 1, 3, torch.float32)
"""Three tokens on each of two context parallel ranks, which tp 2 cannot split evenly."""
SHAPES = {"hidden": HIDDEN, "logits": LOGITS, "topk": TOPK, "odd": ODD}

# (teacher, student): (ranks, layout) each. Up to four ranks, with context parallelism and uneven
# data parallel sizes (1:2, 1:3, 2:1, 3:1).
PAIRS = {
    "one-to-one": ((1, {}), (1, {})),
    "one-to-tp2": ((1, {}), (2, {"tp": 2})),
    "tp2-to-one": ((2, {"tp": 2}), (1, {})),
    "tp2sp-to-tp2": ((2, {"tp": 2, **SP}), (2, {"tp": 2})),
    "tp2-to-tp2sp": ((2, {"tp": 2}), (2, {"tp": 2, **SP})),
    "one-to-dp3": ((1, {}), (3, {})),
    "dp3-to-one": ((3, {}), (1, {})),
    "dp2-to-cp2": ((2, {}), (2, {"cp": 2})),
    "cp2-to-tp2sp": ((2, {"cp": 2}), (2, {"tp": 2, **SP})),
    "tp2-to-dp2": ((2, {"tp": 2}), (2, {})),
    "pp2-to-dp2": ((2, {"pp": 2}), (2, {})),
    "tp2-to-pp2": ((2, {"tp": 2}), (2, {"pp": 2})),
    "one-to-cp3": ((1, {}), (3, {"cp": 3})),
    "dp2-to-one": ((2, {}), (1, {})),
    # Five ranks: data parallel sizes that do not divide each other.
    "dp3-to-dp2": ((3, {}), (2, {})),
    "one-to-dp4": ((1, {}), (4, {})),
}


def grid(role, ranks, layout, first=0):
    p = ParallelConfig(**layout)
    return Grid(role, p, ranks // p.model_ranks, first)


LARGE = [{"tp": tp, "cp": cp, "pp": pp} for tp, cp, pp in itertools.product((1, 2, 3, 4), (1, 2, 4), (1, 2))]


@pytest.mark.parametrize("name", SHAPES)
def test_messages_carry_every_element_once(name):
    """For any two layouts, in one process: messages bring exactly the student rank's part, once."""
    shape = StreamShape(SHAPES[name].payload, 48 if name != "odd" else 24, 2, 12, torch.float32)
    for left, right in itertools.product(LARGE, LARGE):
        teacher, student = ParallelConfig(**left), ParallelConfig(**right)
        t, s = Grid("teacher", teacher, 2), Grid("student", student, 3, first=1000)
        plan = messages(shape, t, s, 1, 2)
        for cp, tp in itertools.product(range(student.cp), range(student.tp)):
            want = local_signal(shape, student, 5, cp, tp)
            got, times = torch.full(want.shape, torch.nan), torch.zeros(want.shape)
            for m in plan:
                if m.target == s.last_stage(2, cp, tp):
                    source = next(
                        p
                        for p in itertools.product(range(teacher.cp), range(teacher.tp))
                        if t.last_stage(1, *p) == m.source
                    )
                    got[m.target_rows, :, m.target_columns] = local_signal(shape, teacher, 5, *source)[
                        m.source_rows, :, m.source_columns
                    ]
                    times[m.target_rows, :, m.target_columns] += 1
            assert torch.equal(got, want), (left, right, cp, tp)
            assert (times == 1).all(), (left, right, cp, tp)


def test_sent_bytes_equal_payload_bytes():
    """Hidden states: each token goes once to each receiving group, for all tp sizes."""
    shape = StreamShape("hidden", 48, 2, 12, torch.bfloat16)
    for left, right in itertools.product(LARGE, LARGE):
        plan = messages(
            shape,
            Grid("teacher", ParallelConfig(**left), 1),
            Grid("student", ParallelConfig(**right), 1, 1000),
            0,
            0,
        )
        elements = sum(torch.Size(m.shape(2)).numel() for m in plan)
        copies = 1 if 48 // right["cp"] % right["tp"] == 0 else right["tp"]
        assert elements * 2 == copies * 48 * 2 * shape.width * shape.dtype.itemsize


def roles_of(pair):
    teacher, student = PAIRS[pair]
    return {"student": student, "teacher": teacher}


STREAMS = [("hidden", 1), ("hidden", 3), ("logits", 3)]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("name", "window"), STREAMS)
def test_received_signals_equal_sent_signals(results, ranks, name, pair, window):
    """Bitwise, with random delays on both sides; three streams of a pair one after another."""
    roles, count = roles_of(pair), 13
    size, cases = sum(n for n, _ in roles.values()), [(SHAPES[payload], room) for payload, room in STREAMS]
    case = {"roles": roles, "cases": cases, "count": count, "delay_s": 0.004}
    by_rank = results.once(
        ("transports", pair), lambda: ranks(size, "teacher_stream_workers.transports", **case)
    )
    found = [streams[STREAMS.index((name, window))] for streams in by_rank]
    assert [rank["wrong"] for rank in found if "wrong" in rank] == [[]] * sum(
        "wrong" in rank for rank in found
    )
    assert sum(rank["received"] for rank in found if "received" in rank) >= count
    assert max(rank.get("in flight", 0) for rank in found) <= window
    teacher, student = (grid(role, *roles[role]) for role in ("teacher", "student"))
    assert max(rank.get("held", 0) for rank in found) <= window * teacher.dp // math.gcd(
        teacher.dp, student.dp
    )
    sent, received = (sum(rank["bytes"] for rank in found if key in rank) for key in ("in flight", "wrong"))
    assert sent == received > 0


@pytest.mark.parametrize("pair", ["tp2-to-dp2", "dp2-to-cp2", "dp3-to-one"])
def test_pairs_of_a_stream_connect_before_the_first_signal(ranks, pair):
    roles = roles_of(pair)
    size = sum(count for count, _ in roles.values())
    assert ranks(size, "teacher_stream_workers.connected", roles=roles, shape=HIDDEN) == [""] * size


def test_rank_that_does_not_connect_is_named(ranks):
    roles = roles_of("one-to-one")
    texts = ranks(2, "teacher_stream_workers.connected", roles=roles, shape=HIDDEN, absent="student")
    assert texts[0] == ""
    assert "student rank 0" in texts[1]
    assert "did not connect for the signals of the teacher" in texts[1]


def test_transfer_that_never_returns_ends_at_a_limit(ranks):
    texts = ranks(2, "teacher_stream_workers.silent_transfer", roles=roles_of("one-to-one"), shape=HIDDEN)
    assert re.search(r"teacher rank 0 .*did not send microbatch 0 in 1 s", texts[0]), texts


def test_teacher_issues_the_next_forward_pass_before_it_sends():
    """One block ahead if the window has room for three blocks, else it sends first."""
    ahead = order_of_work(window=3, pp=1, count=3)
    assert ahead == ["forward 0", "forward 1", "send 0", "forward 2", "send 1", "send 2", "finish"]
    for window in (1, 2):
        first = order_of_work(window=window, pp=1, count=2)
        assert first == ["forward 0", "send 0", "forward 1", "send 1", "finish"]
    pipeline = order_of_work(window=2, pp=2, count=4)
    first = ["forward 0", "forward 1", "send 0", "send 1"]
    assert pipeline == [*first, "forward 2", "forward 3", "send 2", "send 3", "finish"]


def test_window_holds_for_a_thousand_microbatches(ranks):
    shape = StreamShape("hidden", 64, 4, 256, torch.float32)  # 256 KiB
    roles = {"student": (1, {}), "teacher": (1, {})}
    student, teacher = ranks(
        2, "teacher_stream_workers.transport", roles=roles, shape=shape, window=3, count=1000
    )
    assert student["wrong"] == []
    assert teacher["in flight"] == 3
    # 750 microbatches of 256 KiB would be 188 MiB; in KiB.
    assert student["memory at the end"] - student["memory at a quarter"] < 8 * 1024


def test_one_teacher_serves_several_students(ranks):
    """Every student gets every microbatch in its layout.

    The teacher sends when the slowest student has room.
    """
    roles = {"student": (1, {}), "sibling": (2, {"tp": 2}), "teacher": (1, {})}
    found = ranks(
        4, "teacher_stream_workers.transport", roles=roles, shape=HIDDEN, window=2, count=17, delay_s=0.004
    )
    assert [rank["wrong"] for rank in found[:3]] == [[]] * 3
    assert [rank["received"] for rank in found[:3]] == [17] * 3
    assert found[3]["in flight"] <= 2


@pytest.mark.parametrize("window", [1, 3])
def test_slow_student_learns_that_the_stream_ends_early(ranks, window):
    """The teacher must not leave before the student has received the end of the stream."""
    case = {"roles": roles_of("one-to-one"), "shape": HIDDEN, "window": window, "last": 3, "late_s": 0.3}
    assert ranks(2, "teacher_stream_workers.ends_early", **case) == [3, 3]


def test_signal_after_the_end_of_the_stream_is_an_error(ranks):
    case = {"roles": roles_of("one-to-one"), "shape": HIDDEN, "window": 3, "last": 3, "late_s": 0.0}
    student, _ = ranks(2, "teacher_stream_workers.ends_early", **case, read_on=True, timeout_s=60)
    assert student == "the teacher ended the stream before microbatch 3"


@pytest.mark.parametrize(("announced", "due"), [(3, 4), (5, 4)], ids=["duplicate", "out-of-order"])
def test_out_of_order_microbatch_is_an_error(ranks, announced, due):
    student, _ = ranks(
        2,
        "teacher_stream_workers.disordered",
        roles=roles_of("one-to-one"),
        shape=HIDDEN,
        announced=announced,
        due=due,
    )
    assert f"announced microbatch {announced}, but microbatch {due} was due" in student
    assert "teacher rank 0 (job rank 1; dp 0, pp 0, cp 0, tp 0)" in student


# (student, teacher). Bitwise if the teacher computes with the same shapes: tensor and context
# parallel sizes change the rounding.
TRAINED = {
    "one-from-one": ("one", "one"),
    "one-from-dp3": ("one", "dp3"),
    "one-from-pp2": ("one", "pp2"),
    "dp2-from-one": ("dp2", "one"),
    "pp2-from-dp2": ("pp2", "dp2"),
    "pp2-vpp2-from-one": ("pp2-vpp2", "one"),
    "pp2-vpp2-from-pp2": ("pp2-vpp2", "pp2"),
    "cp2-from-cp2": ("cp2", "cp2"),
    "tp2-from-tp2": ("tp2", "tp2"),
    "tp2-sp-from-tp2-sp": ("tp2-sp", "tp2-sp"),
}
ROUNDED = {
    "cp2-from-one": ("cp2", "one"),
    "one-from-cp2": ("one", "cp2"),
    "tp2-sp-from-one": ("tp2-sp", "one"),
    "cp2-from-tp2-sp": ("cp2", "tp2-sp"),
}
TEACHERS = {**BY_NAME, "dp3": Layout("dp3", 3)}


def streamed(results, payload, pair, window):
    """Every number of every step: with the teacher elsewhere, and here."""
    student, teacher = ({**TRAINED, **ROUNDED})[pair]
    runs = (
        results.streamed(payload, BY_NAME[student], TEACHERS[teacher], window),
        results.streamed(payload, BY_NAME[student], None),
    )
    return [[(m.loss, m.divergence, m.ce, m.grad_norm) for m in run] for run in runs]


@pytest.mark.parametrize("pair", TRAINED)
@pytest.mark.parametrize("payload", ["hidden", "logits"])
def test_remote_teacher_matches_colocated_teacher_bitwise(results, payload, pair):
    """Bitwise, with the complete trainer: context parallelism, interleaving, uneven dp sizes."""
    remote, colocated = streamed(results, payload, pair, 1 if pair.startswith("dp2") else 3)
    assert len(remote) == RESUME_AT
    assert remote == colocated


@pytest.mark.parametrize("pair", ROUNDED)
def test_teacher_at_another_layout_differs_by_rounding(results, pair):
    for mine, other in zip(*streamed(results, "hidden", pair, 3), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)  # as in test_training.py


def test_credit_for_another_microbatch_is_an_error(ranks):
    _, teacher = ranks(2, "teacher_stream_workers.wrong_credit", roles=roles_of("one-to-one"), shape=HIDDEN)
    assert (
        "student rank 0 (job rank 0; dp 0, pp 0, cp 0, tp 0) consumed microbatch 5, but microbatch 4 was due"
        in teacher
    )


RECIPE = {
    "model": "m",
    "output": "o",
    "data": {"sequence_length": 24},
    "teacher": {"placement": "remote", "window": 2},
}


def agreement(
    recipe=None,
    *,
    arch=ARCHS["qwen3"],
    vocab_size=150,
    made_from=("abc", "def"),
    tokenizer="t",
    shape=HIDDEN,
    window=2,
    ranks=1,
):
    link = Link(None, shape, grid("teacher", ranks, {}), [], window)
    return stream_settings(
        make_recipe(recipe or RECIPE),
        link,
        arch,
        vocab_size=vocab_size,
        fingerprints=dict(zip(("teacher checkpoint", "data"), made_from)),
        tokenizer={"name": tokenizer},
    )


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("teacher checkpoint", {"made_from": ("xyz", "def")}),
        ("data", {"made_from": ("abc", "xyz")}),
        ("tokenizer", {"tokenizer": "another"}),
        ("seed", {"recipe": {**RECIPE, "seed": 5}}),
        ("steps", {"recipe": {**RECIPE, "distill": {"steps": 50}}}),
        ("global_batch_size", {"recipe": {**RECIPE, "distill": {"global_batch_size": 4}}}),
        ("skip_batches", {"recipe": {**RECIPE, "distill": {"skip_batches": [[2, 3]]}}}),
        ("valid_batches", {"recipe": {**RECIPE, "distill": {"valid_interval": 50}}}),
        (
            "document_mask",
            {
                "recipe": {
                    **RECIPE,
                    "transformer_impl": "local",
                    "data": {**RECIPE["data"], "document_mask": True},
                }
            },
        ),
        ("temperature", {"recipe": {**RECIPE, "distill": {"temperature": 2.0}}}),
        ("states", {"recipe": {**RECIPE, "distill": {"states": {"layers": {0: 0}}}}}),
        ("head hidden_size", {"arch": ARCHS["qwen3"].resized(hidden_size=48)}),
        ("head vocab_size", {"vocab_size": 149}),
        ("head padded_vocab_size", {"arch": ARCHS["qwen3"].model_copy(update={"vocab_size": 300})}),
        ("payload", {"shape": replace(HIDDEN, payload="logits")}),
        ("sequence_length", {"shape": replace(HIDDEN, sequence_length=48)}),
        ("micro_batch_size", {"shape": replace(HIDDEN, micro_batch_size=1)}),
        ("width", {"shape": replace(HIDDEN, width=8)}),
        ("dtype", {"shape": replace(HIDDEN, dtype=torch.bfloat16)}),
        ("window", {"window": 3}),
        ("teacher ranks", {"ranks": 2}),
    ],
)
def test_each_contract_field_is_compared(field, other):
    (difference,) = differing_fields(agreement(), agreement(**other))
    assert difference.startswith(f"{field}: ")


def test_contract_has_no_other_field():
    fixed = {
        "head tap",
        "head logit_scale",
        "head soft_cap",
        "head bias",
        "context parallel order",
        "stream version",
    }
    named = {
        "teacher checkpoint",
        "data",
        "tokenizer",
        "seed",
        "steps",
        "skip_batches",
        "valid_batches",
        "document_mask",
        "global_batch_size",
        "temperature",
        "states",
        "window",
        "teacher ranks",
    }
    assert agreement().keys() == fixed | named | {
        "head hidden_size",
        "head vocab_size",
        "head padded_vocab_size",
        *vars(HIDDEN),
    }


@pytest.mark.parametrize("payload", ["hidden", "logits", "topk"])
def test_planner_counts_stream_bytes(payload):
    arch = ARCHS["qwen3"]
    recipe = make_recipe(
        {
            **RECIPE,
            "teacher": {
                "placement": "remote",
                "payload": payload,
                **({"top_k": 7} if payload == "topk" else {}),
            },
        }
    )
    width, dtype = {
        "hidden": (40, torch.bfloat16),
        "logits": (256, torch.bfloat16),
        "topk": (15, torch.int32),
    }[payload]
    assert payload_bytes_per_token(arch, recipe) == width * dtype.itemsize


FAULTS = {
    "teacher 0 kill before announcing 4": "teacher rank 0",
    "teacher 0 kill while sending 4": "teacher rank 0",
    "teacher 0 kill after sending 4": "teacher rank 0",
    "teacher 0 hang before announcing 4": "teacher rank 0",
    "teacher 0 raise before announcing 4": "this rank has a defect",
    "student 1 kill before the credit 4": "student rank 1",
    "student 1 kill after the credit 4": "student rank 1",
    "student 1 hang before the credit 4": "student rank 1",
}


@pytest.mark.parametrize(
    ("fault", "delay_s"),
    [*((fault, 0.0) for fault in FAULTS), ("student 1 kill after the credit 4", 0.5)],
)
def test_dead_or_hung_rank_is_named_within_the_timeout(fault, delay_s):
    """Every other rank raises an error that names the rank.

    The bound is 3 s, plus 3 s in which another rank may report the cause. With a delay the teacher
    sends to a student that is already dead; otherwise it waits for it.
    """
    roles = roles_of("one-to-dp3" if fault.startswith("student") else "dp2-to-one")
    broken, case = Pool(sum(n for n, _ in roles.values())), {"roles": roles, "shape": HIDDEN, "window": 2}
    broken.run("teacher_stream_workers.transport", **case, count=2)
    start = time.monotonic()
    with pytest.raises(RankError) as failure:
        broken.run(
            "teacher_stream_workers.transport",
            **case,
            count=12,
            die=fault,
            delay_s=delay_s,
            timeout_s=30,
            grace_s=5,
        )
    took, said = (
        time.monotonic() - start,
        re.split(r"^rank \d of \d", str(failure.value), flags=re.MULTILINE)[1:],
    )
    print(f"{fault}: {took:.1f} s")
    ends = [text.split("\nlast output")[0].strip().splitlines()[-1] for text in said[: broken.size]]
    silent = [text for text in ends if "died with exit code" in text or "has not answered" in text]
    assert len(silent) == ("raise" not in fault), ends
    named = [text for text in ends if text not in silent and FAULTS[fault] in text]
    assert len(named) == broken.size - len(silent), ends


def test_contract_mismatch_is_rejected_on_both_sides(ranks):
    for message in ranks(
        2, "teacher_stream_workers.contract", roles=roles_of("one-to-one"), sequence_length="48", window=1
    ):
        assert "teacher and student must have the same settings" in message
        assert "sequence_length: teacher '48', student '24'" in message
        assert "window: teacher 1, student 3" in message
        assert "payload" not in message
