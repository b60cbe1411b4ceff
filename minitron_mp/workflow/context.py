"""The context of a stage on one rank: its recipe, artifacts and world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.utils.data import Dataset

from minitron_mp.artifacts.checkpoint import load_weights
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.console import say
from minitron_mp.data.batches import Corpus, microbatches, open_samples
from minitron_mp.data.blend import blend_rows
from minitron_mp.data.positions import SamplePositions, sample_positions
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, must_divide
from minitron_mp.models.arch import Arch
from minitron_mp.models.build import ModelOptions, build_model
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.training.teacher_correction import PREFIX
from minitron_mp.workflow.stage_files import StageFiles


@dataclass(frozen=True, kw_only=True)
class StageContext(StageFiles):
    """A stage of a recipe on this rank."""

    world: World
    students: dict[str, Recipe] = field(default_factory=dict)
    """Role -> recipe of the students that a remote teacher serves in this context."""
    accept: tuple[str, ...] = ()
    """Settings that may change when a training run resumes."""

    def empty_model(
        self,
        arch: Arch,
        *,
        precision: str | None = None,
        training: TrainingConfig | None = None,
        fp8: str | None = None,
        random_weights: bool = False,
    ) -> ShardedModel:
        """Build a model in this recipe's layout, without loading weights.

        precision: default: the recipe's.
        """
        return build_model(
            arch,
            self.world,
            ModelOptions(
                precision=precision or self.recipe.precision,
                sequence_length=self.recipe.data.sequence_length,
                training=training,
                random_weights=random_weights,
                transformer_impl=self.recipe.transformer_impl,
                fp8=fp8,
            ),
        )

    def build(self, stage: str, *, training: TrainingConfig | None = None) -> ShardedModel:
        """Load the model that a stage wrote, in this recipe's layout and precision."""
        model = self.empty_model(self.arch(stage), training=training)
        load_weights(model.chunks, self.paths[stage], self.world)
        return model

    def teacher(
        self, pairs: LayerPairs | None = None, *, corrected: bool = False, fp8: str | None = None
    ) -> ColocatedTeacher:
        """Load the teacher of the student onto these ranks.

        pairs: hidden states that the teacher provides. corrected: with the weights after `distill`, if that
        stage corrects the teacher. fp8: teacher.fp8 for training, None for evaluation.
        """
        return ColocatedTeacher(self.teacher_model(corrected=corrected, fp8=fp8), pairs=pairs)

    def teacher_model(
        self, *, corrected: bool = False, fp8: str | None = None, training: TrainingConfig | None = None
    ) -> ShardedModel:
        """Load the teacher's weights; corrected and fp8 as for teacher()."""
        recipe = self.recipe
        model = self.empty_model(
            self.arch(recipe.distillation_teacher),
            precision=recipe.teacher_precision,
            training=training,
            fp8=fp8,
        )
        if corrected and recipe.corrects_during_distillation:
            load_weights(model.chunks, self.paths["distill"], self.world, PREFIX)
        else:
            load_weights(model.chunks, self.paths[recipe.distillation_teacher], self.world)
        return model

    def groups(
        self, part: str, num_samples: int, micro_batch_size: int, *, exact: bool
    ) -> tuple[int, Iterator[list[Batch]]]:
        """Return the number of groups, and this data-parallel rank's groups of microbatches.

        A group fills the pipeline. part: "calibration", "valid", or a name of data.held_out. exact:
        InputError unless the samples divide; otherwise the last group is padded with samples of
        zero loss_mask.
        """
        world, recipe = self.world, self.recipe
        dp, interleaved = world.groups.dp, world.parallel.interleaved
        if exact:
            problem = must_divide("score.num_samples", num_samples, micro_batch_size, dp.size(), interleaved)
            if problem:
                raise InputError(problem)
        unit = micro_batch_size * dp.size() * interleaved
        num_units = -(-num_samples // unit)
        # A group has up to four rounds of the pipeline.
        most = min(4 * world.parallel.pp, num_units)
        size = unit * max(n for n in range(1, most + 1) if not exact or num_units % n == 0)
        stage = "texts" if part in recipe.data.held_out else "data"
        step = self.manifest.settings.get("step")  # of evaluate --step, which runs beside the training
        text = Corpus(
            self.paths[stage],
            self.tokenizer(),
            recipe.data.sequence_length,
            recipe.seed,
            index_owner=f"step_{step}" if step is not None else "",
            data=recipe.data,
        )
        samples = open_samples(text, part, num_samples, repeat=False)

        def group(number: int) -> list[Batch]:
            return microbatches(
                samples,
                number,
                global_batch_size=size,
                micro_batch_size=micro_batch_size,
                dp_rank=dp.rank(),
                dp_size=dp.size(),
                limit=num_samples,
            )

        count = -(-num_samples // size)
        return count, (group(number) for number in range(count))


def corpus(context: StageContext) -> Corpus:
    """Return the text of the stage data, equal for every role."""
    return Corpus(
        context.paths["data"],
        context.tokenizer(),
        context.recipe.data.sequence_length,
        context.recipe.seed,
        index_owner="teacher" if context.world.role == "teacher" else "",
        data=context.recipe.data,
        run_samples=context.recipe.distill.num_samples,
    )


def training_samples(
    context: StageContext, settings: TrainingConfig, positions: SamplePositions | None = None
) -> Dataset:
    """Return the samples of all steps, equal for every role. positions: None for plain batches."""
    positions = positions or sample_positions(settings, ())
    text, num_samples = corpus(context), positions.num_samples(settings.steps)
    samples = open_samples(text, "train", num_samples, repeat=True)
    blend = text.blend("train")
    if blend and context.world.role != "teacher":
        weights = text.text_weights(blend, num_samples)
        for row in blend_rows(blend, weights, num_samples, text.sequence_length):
            say(f"{context.manifest.stage}: {row}")
    return samples
