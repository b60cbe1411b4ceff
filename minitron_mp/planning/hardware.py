"""Specifications of GPUs and their links."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from minitron_mp.errors import InputError, refuse


class Hardware(BaseModel):
    """One GPU, and a node of them. Bandwidths are of one direction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory_gib: float
    bf16_tflops: float
    """Dense peak."""
    fp8_tflops: float | None = None
    fp32_tflops: float
    hbm_tb_s: float
    nvlink_gb_s: float
    nic_gb_s: float
    """Network bandwidth per GPU: 400 Gb/s are 50."""
    gpus_per_node: int = 8
    product_efficiency: float = 0.73
    """Share of the peak that large matrix products reach: 720 of 989 on the measured H100.

    Used where layer_times.json has no rate.
    """
    hbm_efficiency: float = 0.9
    """Share of the peak that copies reach: 3.02 of 3.35 TB/s on the measured H100."""
    nvlink_efficiency: float = 0.8
    """Share of the peak that large NCCL collectives reach. Assumed."""
    nic_efficiency: float = 0.8
    """Share of the peak that large NCCL collectives reach. Assumed; lower on a shared network."""
    latency_us: float = 20.0
    """Fixed time of a collective of any size. Assumed."""
    host_bf16_ms: float | None = None
    """Time in which the host issues the forward and backward pass of a layer. Default: the value in
    the layer times.
    """
    host_fp8_ms: float | None = None
    """The same time in FP8."""
    host_graphs_ms: float = 0.3
    """The same time with distill.cuda_graphs, for bf16 and FP8. Assumed."""
    tp_exposed: float = 1.0
    """Share of tensor-parallel communication that computation does not hide."""
    tp_exposed_overlapped: float = 0.3
    """The same share with distill.tp_comm_overlap. Assumed."""
    reserved_gib: float = 4.0
    """CUDA context, NCCL, cuBLAS and fragmentation of the allocator. Assumed."""
    correction_bf16: float = 1.085
    """Published step time / step time from arithmetic, in bf16 and float32 (published.py)."""
    correction_fp8: float = 1.065
    """The same ratio in FP8."""
    disk_gb_s: float = 50.0
    """Speed at which all nodes together write a checkpoint. Assumed; a parallel file system."""
    disk_gb_s_node: float = 2.0
    """Speed at which one node writes a checkpoint. Assumed."""
    read_ms_per_sample: float = 20.0
    """Time in which a reader makes one sample: about ten documents, each two reads of a cold file.
    Assumed.
    """
    mtbf_gpu_hours: float = 50_000.0
    """GPU-hours between two failures. Llama 3 405B had 419 unexpected interruptions in 54 days on
    16,384 H100 (arXiv 2407.21783, section 3.3.4).
    """
    restart_minutes: float = 10.0
    """Time from a failure to the first step of the next start. Assumed."""
    source: str = ""
    """Source of the numbers."""

    @property
    def usable_gib(self) -> float:
        """Return the memory that a model may use, in GiB."""
        return self.memory_gib - self.reserved_gib


# Peaks without sparsity. Network: DGX systems with eight adapters, one per GPU.
H100 = Hardware(
    name="H100 SXM",
    memory_gib=79.1,
    bf16_tflops=989,
    fp8_tflops=1979,
    fp32_tflops=67,
    hbm_tb_s=3.35,
    nvlink_gb_s=450,
    nic_gb_s=50,
    source="glennklockwood.com/garden/processors/h100, after NVIDIA's datasheet; 8 x 400 Gb/s",
)
# An H200 is an H100 with other memory.
H200 = H100.model_copy(
    update={
        "name": "H200 SXM",
        "memory_gib": 140.0,
        "hbm_tb_s": 4.8,
        "source": "glennklockwood.com/garden/processors/h100 (an H100 with 141 GB at 4.8 TB/s); "
        "8 x 400 Gb/s assumed",
    }
)
GPUS = {
    "h100": H100,
    "h200": H200,
    "a100": Hardware(
        name="A100 80GB SXM",
        memory_gib=79.1,
        bf16_tflops=312,
        fp32_tflops=19.5,
        hbm_tb_s=2.039,
        nvlink_gb_s=300,
        nic_gb_s=25,
        correction_bf16=1.11,
        source="glennklockwood.com/garden/processors/A100, after NVIDIA's datasheet; 8 x 200 Gb/s assumed",
    ),
}


def read_hardware(gpu: str, path: Path | None = None) -> Hardware:
    """Return a row of GPUS, overridden by the values of a YAML or JSON file.

    InputError for unknown names and keys.
    """
    if gpu not in GPUS:
        raise InputError(
            f"--gpu {gpu} is unknown; give one of {', '.join(GPUS)}. For another GPU, give --hardware "
            "FILE with all keys (docs/planning.md)"
        )
    given = _read(path) if path else {}
    try:
        return Hardware.model_validate(GPUS[gpu].model_dump() | given)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        known = ", ".join(Hardware.model_fields)
        refuse(f"{path} cannot be used; correct or remove these keys (known keys: {known}):", problems)
        raise


def _read(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise InputError(f"--hardware: no file at {path}; give a YAML or JSON file (docs/planning.md)")
    import yaml  # JSON is YAML

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is neither YAML nor JSON ({error}); correct it") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} contains {type(content).__name__}, not keys and values; "
            "write lines such as memory_gib: 80"
        )
    return content
