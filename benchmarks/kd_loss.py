"""Time, memory and error of distillation losses with both output layers, forward and backward.

    python benchmarks/kd_loss.py                            on a GPU: 12B -> 8B, 8192 tokens
    python benchmarks/kd_loss.py --tp-shard 8               one of 8 tp ranks, without communication
    python benchmarks/kd_loss.py --tokens 512 --vocab 4096  other sizes; a CPU's default is small

It compares our loss with others. Columns:
of floor: time of the four products that every implementation needs (logits of student and teacher,
gradients of the student's hidden states and weight), over the time of the loss.
beyond: peak memory that is neither input nor gradient, and the memory of the gradients.
error: of the gradient of the hidden states, relative to its norm, against float64 on some rows.

Without a GPU the memory is computed for the GPU's path at full size, as the sum of live tensors
without data (FakeTensorMode). torch.compile and Liger do not run in this mode. The logits of
student and teacher have a standard deviation of 4. Their difference has one of 0.75, which is a KL
of about 0.3.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minitron_mp.losses import fused as losses
from minitron_mp.losses.fused import distillation_loss
from minitron_mp.losses.objective import Objective, TeacherHidden
from minitron_mp.losses.rows import LogitRows, RankStatistics, RowStatistics
from minitron_mp.losses.tile_sizes import TILE_SIZES

FULL = {"tokens": 8192, "student": 4096, "teacher": 5120, "vocab": 131072}
SMALL = {"tokens": 512, "student": 256, "teacher": 320, "vocab": 4096}
ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
"""The tensor parallel group of one rank."""
GB = 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in FULL:
        parser.add_argument(f"--{name}", type=int, help=f"{FULL[name]} on a GPU, {SMALL[name]} on a CPU")
    parser.add_argument("--tp-shard", type=int, default=1, help="divide the vocabulary by this")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rows", type=int, default=64, help="in which the error is measured")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    usual = FULL if args.device == "cuda" else SMALL
    sizes = {name: getattr(args, name) or usual[name] for name in FULL}
    sizes["vocab"] //= args.tp_shard
    name = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{name}, torch {torch.__version__}, bf16, "
        f"{', '.join(f'{key} {value}' for key, value in sizes.items())}\n"
    )

    case = make_case(sizes, args.device)
    floor = seconds(lambda: products(case), args.device, args.repeats)
    want, rows = exact(case, args.rows), sample(case, args.rows)
    if not find_spec("liger_kernel"):
        print("liger_kernel is not installed: left out")
    print(f"{'':28} {'ms':>8} {'of floor':>8} {'beyond GB':>9} {'gradients':>9} {'error':>8}")
    print(f"{'the four products':28} {floor * 1e3:8.1f} {1:8.0%}")
    failed = False
    for method, run in methods().items():
        try:
            duration, (beyond, kept) = (
                seconds(partial(run, case), args.device, args.repeats),
                gpu_memory(run, case) if args.device == "cuda" else (None, None),
            )
            error = (run(case)[rows].double() - want).norm() / want.norm()
        except Exception as problem:  # of another library, whose row must not end the table
            first_line = (str(problem).splitlines() or [""])[0]
            print(f"{method:28} does not run: {type(problem).__name__} {first_line[:90]}")
            failed |= method.startswith("ours")
            continue
        memory = f"{beyond / GB:9.2f} {kept / GB:9.2f}" if args.device == "cuda" else f"{'':19}"
        print(f"{method:28} {duration * 1e3:8.1f} {floor / duration:8.0%} {memory} {error:8.1e}", flush=True)
    if args.device == "cpu":
        full = FULL | {"vocab": FULL["vocab"] // args.tp_shard}
        print(f"\nmemory of the GPU's path at {', '.join(f'{key} {value}' for key, value in full.items())}")
        for method in ("torch, float32", "ours, float32 logits", "ours, bf16 logits"):
            beyond, kept = fake_memory(methods()[method], full)
            print(f"{method:28} {'':17} {beyond / GB:9.2f} {kept / GB:9.2f}")
    if failed:
        raise SystemExit(1)


def methods() -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """Return name -> function of a case that returns the gradient of the hidden states.

    Each function also stores the gradient of the weight.
    """
    found: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
        f"ours, {name} logits": partial(ours, dtype)
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    }
    found["torch, float32"] = partial(plain, forward_kl)
    found["torch.compile"] = partial(plain, torch.compile(forward_kl))
    if find_spec("liger_kernel"):
        found["Liger fused_linear_jsd"] = liger
    return found


def ours(logits_dtype: torch.dtype, case: dict[str, Tensor]) -> Tensor:
    """As in training: the weight's gradient is added to a float32 buffer that is there before."""
    x, w = _leaves(case)
    w.main_grad = case["main_grad"]
    objective, teacher = (
        Objective(logits_dtype=logits_dtype),
        TeacherHidden(case["teacher"][:, None], case["teacher_weight"]),
    )
    loss, _ = distillation_loss(
        x[:, None],
        w,
        case["labels"],
        case["token_weights"],
        teacher,
        objective,
        vocab_size=len(w),
        group=ALONE,
    )
    loss.backward()
    return x.grad


def plain(loss: Callable[[Tensor, Tensor], Tensor], case: dict[str, Tensor]) -> Tensor:
    x, w = _leaves(case)
    with torch.no_grad():
        teacher = case["teacher"] @ case["teacher_weight"].T
    loss(x @ w.T, teacher).backward()
    return x.grad


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / len(student)


def liger(case: dict[str, Tensor]) -> Tensor:
    """Generalised Jensen-Shannon with beta 0 is forward KL."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    x, w = _leaves(case)
    liger_fused_linear_jsd(x, w, case["teacher"], case["teacher_weight"], None, 0.0).backward()
    return x.grad


def _leaves(case: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return case["student"].detach().requires_grad_(), case["weight"].detach().requires_grad_()


def make_case(sizes: dict[str, int], device: str) -> dict[str, Tensor]:
    """Inputs in bf16. The teacher is the student plus noise, so that both are close."""
    tokens, vocab, h, more = (
        sizes["tokens"],
        sizes["vocab"],
        sizes["student"],
        sizes["teacher"] - sizes["student"],
    )
    torch.manual_seed(0)

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * scale

    x, w = normal(1, tokens, h), normal(4 / h**0.5, vocab, h)
    return {
        "student": x,
        "weight": w,
        "teacher": torch.cat([x, normal(1, tokens, more)], 1),
        "teacher_weight": torch.cat([w, normal(0.75 / more**0.5, vocab, more)], 1),
        "labels": torch.randint(0, vocab, (tokens, 1), device=device),
        "token_weights": torch.full((tokens, 1), 1 / tokens, device=device),
        "main_grad": torch.zeros((vocab, h), device=device),
    }


def products(case: dict[str, Tensor]) -> None:
    z = case["teacher"] @ case["teacher_weight"].T
    z = case["student"] @ case["weight"].T
    torch.mm(z, case["weight"])
    torch.mm(z.T, case["student"])


def sample(case: dict[str, Tensor], rows: int) -> Tensor:
    return torch.linspace(0, len(case["student"]) - 1, rows, device=case["student"].device).long()


def exact(case: dict[str, Tensor], rows: int) -> Tensor:
    """Return the float64 gradient of the hidden states of some rows.

    It is computed by columns, because a float64 copy of the weights is large.
    """
    chosen = sample(case, rows)
    x, t, step = case["student"][chosen].double(), case["teacher"][chosen].double(), 8192
    z_s = torch.cat([x @ w.double().T for w in case["weight"].split(step)], 1)
    z_t = torch.cat([t @ w.double().T for w in case["teacher_weight"].split(step)], 1)
    dz = (z_s.softmax(-1) - z_t.softmax(-1)) / len(case["student"])
    return sum(part @ w.double() for part, w in zip(dz.split(step, 1), case["weight"].split(step)))


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median after two runs that compile and warm up."""
    found = []
    for _ in range(repeats + 2):
        _settle(device)
        start = time.perf_counter()
        run()
        _settle(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def gpu_memory(run: Callable[[dict[str, Tensor]], Tensor], case: dict[str, Tensor]) -> tuple[int, int]:
    """(highest bytes beyond inputs and gradients, bytes of the gradients)."""
    before = torch.cuda.memory_allocated() - case["main_grad"].nbytes
    torch.cuda.reset_peak_memory_stats()
    gradients = _gradient_bytes(run(case), case, run)
    return torch.cuda.max_memory_allocated() - before - gradients - (
        0 if _is_ours(run) else case["main_grad"].nbytes
    ), gradients


def fake_memory(run: Callable[[dict[str, Tensor]], Tensor], sizes: dict[str, int]) -> tuple[int, int]:
    """As gpu_memory, from tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = make_case(sizes, "cpu")
        with Live() as live, as_on_a_gpu():
            gradients = _gradient_bytes(run(case), case, run)
    return live.peak - (gradients - (case["main_grad"].nbytes if _is_ours(run) else 0)), gradients


def _is_ours(run: Any) -> bool:
    return getattr(run, "func", None) is ours


def _gradient_bytes(dx: Tensor, case: dict[str, Tensor], run: Any) -> int:
    return dx.nbytes + (case["main_grad"] if _is_ours(run) else case["weight"]).nbytes


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors that were made inside of it: now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)):
            if storage._cdata not in inputs | self.known:  # neither a view nor in place
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def as_on_a_gpu() -> Any:
    """Run the loss's GPU path on CPU tensors. The kernels are replaced by their allocations.

    Tensors without data could claim to be on a GPU, but torch without CUDA cannot slice them.
    """

    def statistics(rows: LogitRows) -> RankStatistics:
        width = len(RowStatistics._fields)
        return RankStatistics(torch.empty((len(rows.student), width), device=rows.student.device))

    stand_in = SimpleNamespace(statistics=statistics, finish=lambda *_: None)
    with (
        patch.object(FakeTensor, "is_cuda", True, create=True),
        patch.dict(TILE_SIZES, cpu=TILE_SIZES["cuda"]),
        patch.object(losses, "_row_functions", lambda _: stand_in),
    ):
        yield


if __name__ == "__main__":
    main()
