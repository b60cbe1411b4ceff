"""Inside a Megatron-Bridge recipe: our pruned student, teacher and loss in Bridge's pretrain(), scores of a model that Bridge built, and export.

The only file that imports megatron.bridge, and only when a function that needs it is called. Bridge has two ways to say what a model
is, and both end in chunks of megatron-core's GPTModel; a hook on these chunks, before they are wrapped, is all that we add:

    provider   0.6: AutoBridge.to_megatron_provider(), hooks by register_pre_wrap_hook()
    config     main: AutoBridge.get_model_config(), hooks in the list pre_wrap_hooks; Bridge 0.6 trains such a config, too

    cfg.model = bridge.student("out/student", sequence_length=4096)
    step = bridge.KDForwardStep(bridge.BesideStudent("out/teacher"), vocab_size=...)
    bridge.check(cfg, step)
    pretrain(cfg, step, callbacks=[step])

s sequence  b microbatch  h hidden  v padded vocabulary; s' is s/cp, under sequence parallelism s/cp/tp
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from minitron_mp.integrations.megatron_bridge.model import auto_bridge, bare_model
from minitron_mp.models.hf_weights import copy_assets, write_weights


def export_student(
    chunks: list[Any], config: dict[str, Any], folder: str | Path, *, source: str | Path | None = None
) -> None:
    """Write the chunks as a Hugging Face folder through Bridge's mapping of its family; reached by all ranks, rank 0 writes.

    config: config.json of this very model (pruned_config()). source: folder whose tokenizer and other small files belong to it.
    """
    bridge, folder = auto_bridge(config), Path(folder)
    inner = [bare_model(chunk) for chunk in chunks]
    tensors = bridge.export_hf_weights(inner, cpu=True, show_progress=False)
    padded = inner[0].vocab_size, inner[0].config.hidden_size

    def own_rows(name: str, tensor: Tensor) -> Tensor:
        """Embedding and head without the padding of the vocabulary, which Bridge leaves on."""
        return tensor[: config["vocab_size"]] if tensor.shape == padded and ".layers." not in name else tensor

    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        copy_assets(Path(source) if source else None, folder, config)
        write_weights(
            folder, ((name, own_rows(name, tensor)) for name, tensor in tensors), inner[0].config.params_dtype
        )
    for _ in tensors:  # the export is collective: the other ranks walk it to the end
        pass
    dist.barrier()
