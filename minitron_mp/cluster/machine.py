"""What this process finds on its machine: versions, limits, GPUs, FP8, extensions. Imports torch where it is asked about GPUs, no Megatron."""

from __future__ import annotations

import platform
import resource
import shutil
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from minitron_mp.cluster.findings import Finding, Verdict
from minitron_mp.models.number_formats import FP8_SUPPORT

NAMED = ("torch", "megatron-core", "transformers")
"""Packages with a line of their own."""


@dataclass(frozen=True)
class Trap:
    """Versions that do not go together, although each is in its range."""

    versions: dict[str, str]
    verdict: Verdict
    what: str
    cure: str


TRAPS = [
    Trap(
        {"nemo-run": "<=0.11.1", "leptonai": ">=0.47"},
        "warning",
        "this nemo-run cannot be imported with leptonai from 0.47 on",
        "pip install 'leptonai<0.47'",
    ),
    Trap(
        {"megatron-core": ">=0.19", "nvidia-resiliency-ext": "<0.5"},
        "failed",
        "Megatron-Core 0.19 does not save checkpoints with nvidia-resiliency-ext before 0.5",
        "pip uninstall nvidia-resiliency-ext, or install 0.5 or later (glibc 2.39)",
    ),
    Trap(
        {"apex": ">=0.9"},
        "warning",
        "PyPI's apex is another project than NVIDIA's",
        "pip uninstall apex; NVIDIA's is in its PyTorch image",
    ),
    Trap(
        {"nemo-toolkit": ">=3"},
        "warning",
        "nemo-toolkit has no collection llm since 3.0",
        "for NeMo 2 recipes: pip install 'nemo-toolkit<3'",
    ),
]


def packages(name: str = "minitron-mp") -> list[Finding]:
    """Installed versions against the ranges that the package's metadata (setup.py) give, and against TRAPS."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        cure = "pip install -e . in the checkout (launch/venv.sh does it)"
        here = ", ".join(f"{other} {_version(other)}" for other in NAMED)
        return [
            Finding(
                "packages",
                "warning",
                f"{name} runs from a folder and is not installed, so the ranges are not known; {here}",
                cure,
            )
        ]
    python, needed = platform.python_version(), str(about.json.get("requires_python", ""))
    fits = SpecifierSet(needed).contains(python, prereleases=True)
    found = [
        Finding(
            "python",
            "ok" if fits else "failed",
            f"{python}, {needed or 'any'} is needed",
            "" if fits else "make an environment with another Python",
        )
    ]
    others = []
    for text in dict.fromkeys(metadata.requires(name) or []):
        requirement = Requirement(text)
        version, optional = _version(requirement.name), "extra" in str(requirement.marker or "")
        if optional and version is None:
            continue
        if version is None:
            found.append(
                Finding(
                    requirement.name,
                    "failed",
                    f"is not installed, {requirement.specifier or 'any version'} is needed",
                    f"pip install '{text}'",
                )
            )
        elif not requirement.specifier.contains(version, prereleases=True):
            cure = f"pip install '{requirement.name}{requirement.specifier}'"
            found.append(
                Finding(
                    requirement.name,
                    "warning" if optional else "failed",
                    f"{version}, supported: {requirement.specifier}",
                    cure,
                )
            )
        elif requirement.name in NAMED:
            found.append(Finding(requirement.name, "ok", f"{version}, supported: {requirement.specifier}"))
        else:
            others.append(requirement.name)
    if others:
        found.append(Finding("other packages", "ok", f"{len(set(others))} within their ranges"))
    for trap in TRAPS:
        have = {other: _version(other) for other in trap.versions}
        if all(
            version and SpecifierSet(trap.versions[other]).contains(version, prereleases=True)
            for other, version in have.items()
        ):
            found.append(
                Finding(" + ".join(f"{k} {v}" for k, v in have.items()), trap.verdict, trap.what, trap.cure)
            )
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def limits() -> list[Finding]:
    """What a container or a login shell keeps short: shared memory, open files, pinned memory."""
    found = []
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.is_dir() else None
    if free is not None and free < 1 << 30:
        found.append(
            Finding(
                "shared memory",
                "warning",
                f"/dev/shm has {free >> 20} MiB free; NCCL between GPUs of a host needs more",
                "docker run --shm-size=16g",
            )
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < 1024:
        found.append(Finding("open files", "warning", f"at most {files}", "ulimit -n 65536"))
    pinned, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    fabric = Path("/sys/class/infiniband")
    if fabric.is_dir() and any(fabric.iterdir()) and pinned != resource.RLIM_INFINITY:
        found.append(
            Finding(
                "pinned memory",
                "warning",
                f"at most {pinned >> 10} KiB; InfiniBand registers all it sends",
                "docker run --ulimit memlock=-1",
            )
        )
    return found or [Finding("limits", "ok", "shared memory, open files and pinned memory are enough")]


def devices(fp8: dict[str, str], only: int | None = None) -> list[Finding]:
    """The GPUs that torch sees, whether they compute, and whether they can do the FP8 that the recipe asks for.

    fp8: key of the recipe -> kind. only: index of the one GPU to look at, for a rank among others: each look takes memory there.
    """
    import torch

    if not torch.cuda.is_available():
        found = [Finding("GPU", "ok", "none; everything runs on the CPU, with gloo between ranks")]
        if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
            build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a CPU build"
            cure = "nvidia-smi; docker run --gpus all; CUDA_VISIBLE_DEVICES; torch for the driver's CUDA"
            found = [
                Finding(
                    "GPU",
                    "failed",
                    f"this host has an NVIDIA driver, but torch sees no GPU; torch {build}",
                    cure,
                )
            ]
        return found + [
            Finding("FP8", "failed", f"{key}: {kind} needs a GPU", f"drop {key}, or run on Hopper or later")
            for key, kind in fp8.items()
        ]
    found, least = [], (99, 0)
    for index in range(torch.cuda.device_count()) if only is None else [only]:
        about, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        least = min(least, (about.major, about.minor))
        what = f"{about.name}, {total / 2**30:.0f} GiB, compute capability {about.major}.{about.minor}"
        if problem := _computes(index):
            found.append(
                Finding(
                    "GPU",
                    "failed",
                    f"{what}: {problem}",
                    "nvidia-smi -q; a build of torch for this GPU; dcgmi diag",
                )
            )
        elif about.major < 8:
            found.append(Finding("GPU", "failed", f"{what}: no bf16", "use an A100 or later"))
        elif free < 0.9 * total:
            found.append(
                Finding(
                    "GPU",
                    "warning",
                    f"{what}: {(total - free) / 2**30:.1f} GiB are taken",
                    "nvidia-smi says by whom",
                )
            )
        else:
            found.append(Finding("GPU", "ok", what))
    found = [Finding("GPU", f.verdict, f"{found.count(f)} x {f.found}", f.cure) for f in dict.fromkeys(found)]
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    found.append(
        Finding(
            "CUDA, NCCL",
            "ok",
            f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}",
        )
    )
    return found + fp8_findings(fp8, least, _version("transformer-engine"), cuda)


def _computes(index: int) -> str:
    """A small product on a GPU, against the CPU's; "" when it is right."""
    import torch

    try:
        a = torch.arange(64.0).view(8, 8)
        same = torch.equal((a.to(f"cuda:{index}") @ a.T.to(f"cuda:{index}")).cpu(), a @ a.T)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if same else "computes wrong sums"


def fp8_findings(
    wanted: dict[str, str], capability: tuple[int, ...], engine: str | None, cuda: tuple[int, ...]
) -> list[Finding]:
    """What of FP8 is possible with this hardware and software, and what the recipe wants of the rest."""
    lacking: dict[str, str] = {}
    for kind, (least, version, toolkit) in FP8_SUPPORT.items():
        if capability < least:
            lacking[kind] = f"compute capability {least[0]}.{least[1]}, here {capability[0]}.{capability[1]}"
        elif engine is None or Version(engine) < Version(version):
            lacking[kind] = f"transformer-engine {version}, here {engine or 'none'}"
        elif cuda < toolkit:
            lacking[kind] = f"CUDA {toolkit[0]}.{toolkit[1]}, here {cuda[0]}.{cuda[1]}"
    have = [kind for kind in FP8_SUPPORT if kind not in lacking]
    found = [
        Finding(
            "FP8",
            "ok",
            "possible: " + ", ".join(have) if have else f"not possible: {lacking['tensorwise']} is needed",
        )
    ]
    failed = [
        Finding(
            "FP8",
            "failed",
            f"{key}: {kind} needs {lacking[kind]}",
            f"set {key} to one of: {', '.join(have) or 'null'}",
        )
        for key, kind in wanted.items()
        if kind in lacking
    ]
    return failed or found


def extensions(on_gpu: bool) -> list[Finding]:
    """Transformer Engine and Apex: imported where they are installed, since a build for another torch shows only then."""
    uses = {
        "Transformer Engine": (
            "transformer_engine.pytorch",
            "its layers and FP8",
            "pip install -e .[te], or NVIDIA's PyTorch image (Dockerfile)",
        ),
        "Apex": (
            "apex",
            "the fused accumulation of weight gradients",
            "optional; NVIDIA's PyTorch image has it, PyPI's apex is another project",
        ),
    }
    found = []
    for name, (module, what, cure) in uses.items():
        if find_spec(module.split(".")[0]) is None:
            missing = on_gpu and name == "Transformer Engine"
            found.append(
                Finding(
                    name,
                    "warning" if missing else "ok",
                    f"not installed; without {what}",
                    cure if on_gpu else "",
                )
            )
            continue
        try:
            import_module(module)
        except Exception as error:  # ImportError, OSError of a library, whatever a foreign module raises
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            found.append(
                Finding(
                    name,
                    "failed",
                    f"is installed and cannot be imported: {text}",
                    "build it for this torch and CUDA, or uninstall it",
                )
            )
        else:
            found.append(
                Finding(
                    name,
                    "ok",
                    f"{_version(module.split('.')[0].replace('_', '-')) or ''} can be imported".strip(),
                )
            )
    return found
