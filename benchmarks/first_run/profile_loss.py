"""Where the time of the distillation loss goes, by kernel.

    python benchmarks/first_run/profile_loss.py --vocab 131072 --logits float32 --out result.json

Without a GPU it lists CPU operators at small sizes, to test the program.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))
import kd_loss

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
MOST_ROWS = 25


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--logits", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    sizes = dict(kd_loss.FULL if on_gpu else kd_loss.SMALL)
    sizes["vocab"] = args.vocab or sizes["vocab"]
    case = kd_loss.make_case(sizes, "cuda" if on_gpu else "cpu")
    for _ in range(3):
        kd_loss.ours(DTYPES[args.logits], case)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        kd_loss.ours(DTYPES[args.logits], case)
        if on_gpu:
            torch.cuda.synchronize()
    content = {"sizes": sizes, "logits": args.logits} | by_kernel(found.events(), on_gpu)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{content['launches']} kernels, {content['busy_ms']:.2f} ms busy of {content['span_ms']:.2f}")
    for row in content["kernels"]:
        print(f"{row['ms']:8.3f} ms {row['count']:5} x {row['us_each']:8.1f} us  {row['name'][:100]}")


def by_kernel(events: Any, on_gpu: bool) -> dict[str, Any]:
    """Sum the events of one device by name; the longest ones first."""
    device = "CUDA" if on_gpu else "CPU"
    kernels = [event for event in events if event.device_type.name == device]
    if not kernels:
        raise SystemExit(f"the profiler has recorded no event on {device}")
    times: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        times[event.name].append(event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total)
    first = min(event.time_range.start for event in kernels)
    last = max(event.time_range.end for event in kernels)
    rows = [
        {"name": name, "count": len(us), "ms": sum(us) / 1e3, "us_each": sum(us) / len(us)}
        for name, us in sorted(times.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "launches": len(kernels),
        "busy_ms": sum(row["ms"] for row in rows),
        "span_ms": (last - first) / 1e3,
        "kernels": rows[:MOST_ROWS],
    }


if __name__ == "__main__":
    main()
