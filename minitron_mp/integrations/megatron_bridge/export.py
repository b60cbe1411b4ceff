"""Export of a student with Bridge's weight mapping, for every family that Bridge maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from minitron_mp.distributed.process_groups import host_barrier
from minitron_mp.integrations.megatron_bridge.model import auto_bridge, bare_model
from minitron_mp.models.hf_writer import copy_assets, write_weights


def export_student(
    chunks: list[Any], config: dict[str, Any], folder: str | Path, *, source: str | Path | None = None
) -> None:
    """Write model chunks as a Hugging Face folder. Called by all ranks; rank 0 writes.

    config: content of this model's config.json (pruned_config()). source: folder with the tokenizer
    and the other small files of the model.
    """
    bridge, folder = auto_bridge(config), Path(folder)
    inner = [bare_model(chunk) for chunk in chunks]
    tensors = bridge.export_hf_weights(inner, cpu=True, show_progress=False)
    padded = inner[0].vocab_size, inner[0].config.hidden_size

    def without_padding(name: str, tensor: Tensor) -> Tensor:
        """Return embedding and head without the padded rows, which Bridge keeps."""
        is_padded = tensor.shape == padded and ".layers." not in name
        return tensor[: config["vocab_size"]] if is_padded else tensor

    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        copy_assets(Path(source) if source else None, folder, config)
        write_weights(
            folder,
            ((name, without_padding(name, tensor)) for name, tensor in tensors),
            inner[0].config.params_dtype,
        )
    for _ in tensors:  # the export is collective, so the other ranks iterate to the end
        pass
    host_barrier()
