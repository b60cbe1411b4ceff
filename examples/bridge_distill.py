"""Distil a pruned model from its teacher with a Megatron-Bridge recipe.

torchrun --nproc-per-node 8 examples/bridge_distill.py out/student out/teacher train.train_iters=1000

out/student and out/teacher are the outputs of `minitron-mp prune` and `import`. Further arguments
override the recipe, for example model.tensor_model_parallel_size=4.
"""

import sys
from pathlib import Path

from minitron_mp import InputError
from minitron_mp.integrations.megatron_bridge import (
    ColocatedTeacher,
    KDForwardStep,
    Objective,
    check_config,
    student_provider,
)

SEQUENCE_LENGTH = 2048


def recipe(
    pruned: str | Path,
    teacher: str | Path,
    *,
    sequence_length: int = SEQUENCE_LENGTH,
    precision: str = "bf16",
):
    """Return ConfigContainer and forward step.

    Set dataset.blend; the default is Bridge's mock data.
    """
    from megatron.bridge.training.config import (
        CheckpointConfig,
        ConfigContainer,
        DistributedDataParallelConfig,
        GPTDatasetConfig,
        LoggerConfig,
        OptimizerConfig,
        RNGConfig,
        SchedulerConfig,
        TokenizerConfig,
        TrainingConfig,
        ValidationConfig,
    )

    cfg = ConfigContainer(
        model=student_provider(pruned, sequence_length=sequence_length, precision=precision),
        train=TrainingConfig(train_iters=100, global_batch_size=8, micro_batch_size=1),
        validation=ValidationConfig(eval_interval=None, eval_iters=0),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=1e-4,
            min_lr=1e-5,
            weight_decay=0.1,
            bf16=precision == "bf16",
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=10, start_weight_decay=0.1, end_weight_decay=0.1
        ),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, average_in_collective=False
        ),
        dataset=GPTDatasetConfig(
            random_seed=1234,
            seq_length=sequence_length,
            blend=None,
            split="99,1,0",
            dataloader_type="single",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            num_dataset_builder_threads=1,
        ),
        tokenizer=TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(Path(pruned) / "assets")
        ),
        checkpoint=CheckpointConfig(save=None, ckpt_format="torch_dist"),
        logger=LoggerConfig(log_interval=1),
        rng=RNGConfig(seed=1234),
        mixed_precision=None,  # student_provider() sets the dtype
    )
    colocated = ColocatedTeacher(teacher, precision=precision)
    return cfg, KDForwardStep(
        colocated,
        vocab_size=colocated.arch.vocab_size,
        objective=Objective(kl_weight=1.0, ce_weight=0.0),
    )


def main() -> None:
    from megatron.bridge.training.pretrain import pretrain
    from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides

    cfg, step = recipe(sys.argv[1], sys.argv[2])
    cfg = process_config_with_overrides(config=cfg, config_filepath=None, cli_overrides=sys.argv[3:] or None)
    check_config(cfg, step)
    pretrain(cfg, step, callbacks=[step])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    try:
        main()
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
