"""Checks of this process's machine: package versions, limits, GPUs, FP8, extensions.

torch is imported only to check GPUs, and Megatron-Core is not imported.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from minitron_mp.cluster.checks import CheckResult, Verdict, failed, ok, warning
from minitron_mp.cluster.temporary_folder import check_temporary_folder
from minitron_mp.models.number_formats import FP8_SUPPORT

MAIN_PACKAGES = ("torch", "megatron-core", "transformers")
"""Packages with a separate row in the table."""


@dataclass(frozen=True)
class Conflict:
    """Versions that do not work together, although each of them is in its supported range."""

    versions: dict[str, str]
    verdict: Verdict
    detail: str
    advice: str


CONFLICTS = [
    Conflict(
        {"nemo-run": "<=0.11.1", "leptonai": ">=0.47"},
        "warning",
        "this nemo-run cannot be imported with leptonai 0.47 or later",
        "pip install 'leptonai<0.47'",
    ),
    Conflict(
        {"megatron-core": ">=0.19", "nvidia-resiliency-ext": "<0.5"},
        "failed",
        "Megatron-Core 0.19 cannot save checkpoints with nvidia-resiliency-ext before 0.5",
        "pip uninstall nvidia-resiliency-ext, or install 0.5 or later (needs glibc 2.39)",
    ),
    Conflict(
        {"apex": ">=0.9"},
        "warning",
        "the package apex on PyPI is not NVIDIA's Apex",
        "pip uninstall apex; NVIDIA's PyTorch image contains NVIDIA's Apex",
    ),
    Conflict(
        {"nemo-toolkit": ">=3"},
        "warning",
        "nemo-toolkit 3.0 and later have no collection llm",
        "for NeMo 2 recipes: pip install 'nemo-toolkit<3'",
    ),
]


@dataclass(frozen=True)
class Extension:
    """An optional compiled package."""

    module: str
    purpose: str
    advice: str


EXTENSIONS = {
    "Transformer Engine": Extension(
        "transformer_engine.pytorch",
        "its layers and FP8",
        "pip install -e .[te], or use NVIDIA's PyTorch image (Dockerfile)",
    ),
    "Apex": Extension(
        "apex",
        "fused weight-gradient kernels",
        "optional; contained in NVIDIA's PyTorch image (apex on PyPI is another project)",
    ),
}


def check_packages(name: str = "minitron-mp") -> list[CheckResult]:
    """Check installed versions against the ranges in the package's metadata (setup.py) and
    CONFLICTS.
    """
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        versions = ", ".join(f"{package} {_version(package)}" for package in MAIN_PACKAGES)
        return [
            warning(
                "packages",
                f"{name} is imported from a folder, not installed, so the supported ranges are unknown; "
                f"installed: {versions}",
                "pip install -e . in the checkout (launch/venv.sh does this)",
            )
        ]
    results = [_check_python(str(about.json.get("requires_python", "")))]
    other_packages = set()
    for text in dict.fromkeys(metadata.requires(name) or []):
        requirement = Requirement(text)
        result = _check_requirement(requirement, text)
        if result is None:
            continue
        if result.verdict == "ok" and requirement.name not in MAIN_PACKAGES:
            other_packages.add(requirement.name)
        else:
            results.append(result)
    if other_packages:
        results.append(ok("other packages", f"{len(other_packages)} in their supported ranges"))
    return results + _check_conflicts()


def _check_python(needed: str) -> CheckResult:
    version = platform.python_version()
    detail = f"{version}, required: {needed or 'any'}"
    if SpecifierSet(needed).contains(version, prereleases=True):
        return ok("python", detail)
    return failed("python", detail, "create an environment with a supported Python")


def _check_requirement(requirement: Requirement, text: str) -> CheckResult | None:
    """Return the result of one requirement; None for an optional package that is not installed."""
    version = _version(requirement.name)
    is_optional = "extra" in str(requirement.marker or "")
    if version is None:
        if is_optional:
            return None
        detail = f"not installed, required: {requirement.specifier or 'any version'}"
        return failed(requirement.name, detail, f"pip install '{text}'")
    detail = f"{version}, supported: {requirement.specifier}"
    if requirement.specifier.contains(version, prereleases=True):
        return ok(requirement.name, detail)
    advice = f"pip install '{requirement.name}{requirement.specifier}'"
    return CheckResult(requirement.name, "warning" if is_optional else "failed", detail, advice)


def _check_conflicts() -> list[CheckResult]:
    results = []
    for conflict in CONFLICTS:
        versions = {name: _version(name) for name in conflict.versions}
        if all(
            version and SpecifierSet(conflict.versions[name]).contains(version, prereleases=True)
            for name, version in versions.items()
        ):
            names = " + ".join(f"{name} {version}" for name, version in versions.items())
            results.append(CheckResult(names, conflict.verdict, conflict.detail, conflict.advice))
    return results


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_limits() -> list[CheckResult]:
    """Check shared memory, open files and pinned memory, whose limits are often too low in containers
    and login shells.
    """
    results = []
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        if free < 1 << 30:
            detail = f"/dev/shm has {free >> 20} MiB free; NCCL between GPUs of a host needs more"
            results.append(warning("shared memory", detail, "docker run --shm-size=16g"))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)  # a job raises the soft limit to the hard one
    if files != resource.RLIM_INFINITY and files < 1024:
        results.append(warning("open files", f"hard limit is {files}", "ulimit -n 65536"))
    pinned, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infiniband = Path("/sys/class/infiniband")
    has_infiniband = infiniband.is_dir() and any(infiniband.iterdir())
    if has_infiniband and pinned != resource.RLIM_INFINITY:
        detail = f"limit is {pinned >> 10} KiB; InfiniBand pins all buffers that it sends"
        results.append(warning("pinned memory", detail, "docker run --ulimit memlock=-1"))
    results += check_temporary_folder(os.path.expandvars("$TMPDIR"))
    return results or [ok("limits", "shared memory, open files, pinned memory and TMPDIR are sufficient")]


def check_gpus(fp8: Mapping[str, str], only: int | None = None) -> list[CheckResult]:
    """Check whether torch finds GPUs, whether they compute, and whether they support the recipe's
    FP8.

    fp8: key of the recipe -> kind of scaling. only: index of the one GPU to check, for a rank of a
    job, because each checked GPU gets a CUDA context.
    """
    import torch

    if not torch.cuda.is_available():
        return [_check_missing_gpu(torch.version.cuda), *_fp8_without_gpu(fp8)]
    results = []
    capability = (99, 0)
    for index in range(torch.cuda.device_count()) if only is None else [only]:
        properties = torch.cuda.get_device_properties(index)
        capability = min(capability, (properties.major, properties.minor))
        results.append(_check_gpu(index))
    counted = [
        CheckResult("GPU", result.verdict, f"{results.count(result)} x {result.detail}", result.advice)
        for result in dict.fromkeys(results)
    ]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    counted.append(ok("CUDA, NCCL", f"CUDA {torch.version.cuda}, NCCL {nccl}"))
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return counted + check_fp8(fp8, capability, _version("transformer-engine"), cuda)


def _check_missing_gpu(cuda: str | None) -> CheckResult:
    if not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        return ok("GPU", "no GPU; all stages run on the CPU, with gloo between ranks")
    build = f"torch is built for CUDA {cuda}" if cuda else "torch is a CPU build"
    return failed(
        "GPU",
        f"this host has an NVIDIA driver, but torch sees no GPU; {build}",
        (
            "check nvidia-smi, docker run --gpus all, CUDA_VISIBLE_DEVICES, and that torch fits the "
            "driver's CUDA"
        ),
    )


def _fp8_without_gpu(fp8: Mapping[str, str]) -> list[CheckResult]:
    return [
        failed("FP8", f"{key}: {kind} needs a GPU", f"remove {key}, or run on Hopper or later")
        for key, kind in fp8.items()
    ]


def _check_gpu(index: int) -> CheckResult:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    name = f"{properties.name}, {total / 2**30:.0f} GiB, compute capability {capability}"
    problem = _compute_problem(index)
    if problem:
        advice = "check nvidia-smi -q and dcgmi diag, and that this build of torch supports the GPU"
        return failed("GPU", f"{name}: {problem}", advice)
    if properties.major < 8:
        return failed("GPU", f"{name}: no bf16", "use an A100 or later")
    if free < 0.9 * total:
        used = f"{(total - free) / 2**30:.1f} GiB are in use"
        return warning("GPU", f"{name}: {used}", "nvidia-smi lists the processes that use the GPU")
    return ok("GPU", name)


def _compute_problem(index: int) -> str:
    """Compare a small matrix product on a GPU and the CPU; return the problem, or ""."""
    import torch

    try:
        a = torch.arange(64.0).view(8, 8)
        is_equal = torch.equal((a.to(f"cuda:{index}") @ a.T.to(f"cuda:{index}")).cpu(), a @ a.T)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "" if is_equal else "computes wrong results"


def check_fp8(
    requested: Mapping[str, str], capability: tuple[int, ...], engine: str | None, cuda: tuple[int, ...]
) -> list[CheckResult]:
    """Check whether hardware and software support the recipe's kinds of FP8.

    requested: key of the recipe -> kind. engine: version of Transformer Engine.
    """
    missing: dict[str, str] = {}
    for kind, (least, version, toolkit) in FP8_SUPPORT.items():
        if capability < least:
            missing[kind] = (
                f"compute capability {least[0]}.{least[1]}, this GPU has {capability[0]}.{capability[1]}"
            )
        elif engine is None or Version(engine) < Version(version):
            missing[kind] = f"transformer-engine {version}, installed: {engine or 'none'}"
        elif cuda < toolkit:
            missing[kind] = f"CUDA {toolkit[0]}.{toolkit[1]}, torch has {cuda[0]}.{cuda[1]}"
    supported = [kind for kind in FP8_SUPPORT if kind not in missing]
    failures = [
        failed(
            "FP8",
            f"{key}: {kind} needs {missing[kind]}",
            f"set {key} to one of: {', '.join(supported) or 'null'}",
        )
        for key, kind in requested.items()
        if kind in missing
    ]
    if failures:
        return failures
    if supported:
        return [ok("FP8", f"supported: {', '.join(supported)}")]
    return [ok("FP8", f"not supported: needs {missing['tensorwise']}")]


def check_extensions(on_gpu: bool) -> list[CheckResult]:
    """Check Transformer Engine and Apex by an import, because a build for another torch fails only
    there.
    """
    results = []
    for name, extension in EXTENSIONS.items():
        package = extension.module.split(".")[0]
        if find_spec(package) is None:
            detail = f"not installed; {extension.purpose} are not available"
            is_missing = on_gpu and name == "Transformer Engine"
            verdict: Verdict = "warning" if is_missing else "ok"
            results.append(CheckResult(name, verdict, detail, extension.advice if on_gpu else ""))
            continue
        try:
            import_module(extension.module)
        except Exception as error:  # ImportError, OSError of a library, or anything a module raises
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            detail = f"installed, but cannot be imported: {reason}"
            results.append(failed(name, detail, "build it for this torch and CUDA, or uninstall it"))
        else:
            version = _version(package.replace("_", "-")) or ""
            results.append(ok(name, f"{version} can be imported".strip()))
    return results
