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

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.schedule import local_batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, refuse
from minitron_mp.integrations.megatron_bridge.model import bare_model, world_of_provider
from minitron_mp.integrations.megatron_bridge.teacher import ColocatedTeacher, RemoteTeacher
from minitron_mp.losses.fused import Objective, distillation_loss
from minitron_mp.models.build import DTYPES, output_weight
from minitron_mp.models.precision import silently_wrong


# ---- training ----------------------------------------------------------------------------------------------------------------------
class KDForwardStep:
    """Forward step and callbacks of pretrain(cfg, step, callbacks=[step]): distils into a student() from a teacher.

    The loss is losses.distillation_loss, vocabulary-parallel and in chunks of tokens; the model's own cross-entropy does not run. vocab_size:
    without padding. Bridge logs "kd loss" (what is optimised), "kl" and "lm loss", means over tokens; and the teacher is loaded when training
    starts and dropped after the last evaluation.
    """

    def __init__(
        self,
        teacher: ColocatedTeacher | RemoteTeacher,
        *,
        vocab_size: int,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        logits_precision: str = "fp32",
    ):
        self.teacher, self.vocab_size = teacher, vocab_size
        self.objective = Objective(divergence, temperature, kl_weight, ce_weight, DTYPES[logits_precision])
        self.world: World | None = None
        self.trained = False

    def __call__(
        self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False
    ) -> tuple[Tensor, Callable]:
        """(output, loss function): Bridge's forward step; Bridge binds the first argument, its GlobalState."""
        if self.world is None:
            raise InputError(
                "the step was not told that training starts: give it to pretrain() among the callbacks, too: callbacks=[step]"
            )
        assert not return_schedule_plan, (
            "check() refuses the overlap of expert communication, which alone asks for a schedule plan"
        )
        world, student, batch = self.world, bare_model(model), {}
        if world.is_first_stage or world.is_last_stage:  # Bridge reads no data elsewhere
            raw = next(data_iterator)
            if raw.get("cu_seqlens") is not None or raw.get("cu_seqlens_q") is not None:
                raise InputError(
                    "this data set packs several sequences into one (cu_seqlens); set the packing of cfg.dataset off"
                )
            batch = local_batch(
                {key: raw[key] for key in ("tokens", "labels", "loss_mask", "position_ids")}, world
            )
        signal = self.teacher.signal(batch, student)
        cast = {"fp32_output": False} if _in_half(model) else {}  # or the hidden states would come in float32
        output = model(batch.get("tokens"), batch.get("position_ids"), None, **cast)
        return output, partial(
            self._loss,
            model=model,
            batch=batch,
            signal=signal,
            check_nan=state.cfg.rerun_state_machine.check_for_nan_in_loss,
        )

    def _loss(
        self, output: Tensor, *, model: Any, batch: Batch, signal: Any, check_nan: bool
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(sum over tokens, tokens, name -> [sum, tokens]) of a microbatch on the last stage; Bridge adds them over ranks and divides."""
        assert self.world is not None
        student, hidden, mask = bare_model(model), output.transpose(0, 1), batch["loss_mask"]
        weight = output_weight(student)
        tied_here = (
            student.share_embeddings_and_output_weights and student.pre_process
        )  # then the embedding's gradient comes last, and tells
        if torch.is_grad_enabled() and model.ddp_config.overlap_grad_reduce and not tied_here:
            # The loss adds the weight's gradient to its main_grad; this tells the wrapper, which waits for all of a bucket.
            hidden.register_hook(lambda _: model.param_to_bucket_group[weight].register_grad_ready(weight))
        target = self.teacher.target(signal) if signal is not None else None
        objective = (
            self.objective
            if target is not None
            else Objective(kl_weight=0.0, ce_weight=1.0, logits_dtype=self.objective.logits_dtype)
        )
        place = {"vocab_size": self.vocab_size, "group": self.world.groups.tp}
        total, per_token = distillation_loss(
            hidden, weight, batch["labels"], mask, target, objective, **place
        )
        if signal is not None:
            self.teacher.done(signal)
        if check_nan and not torch.isfinite(total):
            raise InputError(
                f"the loss is {total.item()} on {self.world.coordinates}; lower the learning rate, or use params_dtype float32"
            )
        tokens = mask.sum()
        sums = dict(zip(("kd loss", "kl", "lm loss"), (per_token * mask).sum((1, 2))))
        if target is None:
            sums = {"lm loss": sums["lm loss"]}
        return (
            total,
            tokens.to(torch.int32),
            {name: torch.stack([value, tokens.to(value.dtype)]) for name, value in sums.items()},
        )

    # Bridge's callback manager takes any object by the names of its events.
    def on_train_start(self, context: Any) -> None:
        # Not in check(): Bridge fills these settings in from others on its way here.
        wrong = [
            text
            for chunk in context.model
            if hasattr(chunk, "ddp_config")
            for text in silently_wrong(chunk.config, chunk.ddp_config)
        ]
        refuse("this model would be trained wrongly:", list(dict.fromkeys(wrong)))
        self.world = world_of_provider(context.model)
        self.teacher.start(self.world, context.state.cfg.model.seq_length)

    def on_train_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_eval_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_test_step_end(self, context: Any) -> None:
        self.teacher.end_step()

    def on_train_end(self, context: Any) -> None:
        self.trained = True
        if not (context.state.train_state.do_valid or context.state.train_state.do_test):
            self.teacher.close()

    def on_eval_end(self, context: Any) -> None:
        if self.trained and not context.state.train_state.do_test:
            self.teacher.close()

    def on_test_end(self, context: Any) -> None:
        self.teacher.close()


def _in_half(model: Any) -> bool:
    """Whether Float16Module is around the GPTModel, which casts the output of the last stage unless told not to."""
    while hasattr(model, "module"):
        if hasattr(model, "float16_convertor"):
            return True
        model = model.module
    return False
