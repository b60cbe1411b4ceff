"""What a stage works with on a rank: its recipe and artifacts, and the rank's world."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minitron_mp.artifacts.checkpoint import load_model
from minitron_mp.config.recipe import Recipe
from minitron_mp.config.training import TrainingConfig
from minitron_mp.data.batches import Corpus, micro_batches, open_samples
from minitron_mp.data.tokenizer import Tokenizer, load_tokenizer
from minitron_mp.distillation.frozen_model import ModelCheckpoint, frozen_model
from minitron_mp.distillation.layer_pairs import LayerPairs
from minitron_mp.distillation.teacher import ColocatedTeacher
from minitron_mp.distributed.batch import Batch
from minitron_mp.distributed.world import World
from minitron_mp.errors import InputError, must_divide
from minitron_mp.models.build import build_model
from minitron_mp.models.sharded_model import ShardedModel
from minitron_mp.training.teacher_correction import PREFIX
from minitron_mp.workflow.stage_files import StageFiles

ASSETS = "assets"
"""Folder inside a checkpoint artifact with the Hugging Face side files: config.json, tokenizer."""


@dataclass(frozen=True, kw_only=True)
class StageContext(StageFiles):
    """One stage of one recipe on this rank."""

    world: World
    students: dict[str, Recipe] = field(default_factory=dict)
    """Role -> recipe of the students that a remote teacher serves in this job."""

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of data.tokenizer, or the model's."""
        return load_tokenizer(self.recipe.data.tokenizer or self.paths["import"] / ASSETS)

    @property
    def build_options(self) -> dict[str, Any]:
        """What build_model() takes for every model of this recipe."""
        return {
            "sequence_length": self.recipe.data.sequence_length,
            "transformer_impl": self.recipe.transformer_impl,
        }

    def build(self, stage: str) -> list[Any]:
        """The model that a stage left, loaded, in this recipe's layout and precision."""
        chunks = build_model(
            self.arch(stage), self.world, precision=self.recipe.precision, **self.build_options
        )
        load_model(chunks, self.paths[stage], self.world)
        return chunks

    def sharded_model(self, stage: str) -> ShardedModel:
        """build() with the sizes and the layout of the model."""
        return ShardedModel(
            self.build(stage),
            self.arch(stage),
            self.world,
            self.recipe.data.sequence_length,
            self.recipe.precision,
        )

    def teacher(
        self, pairs: LayerPairs | None = None, *, corrected: bool = False, fp8: str | None = None
    ) -> ColocatedTeacher:
        """The teacher of the student. pairs: states that it hands over. corrected: as it is after distill, where that corrects it. fp8: teacher.fp8
        where it teaches, None where it is judged."""
        checkpoint = self.teacher_checkpoint
        if corrected and self.recipe.corrects_during_distillation:
            checkpoint = replace(checkpoint, folder=self.paths["distill"], prefix=PREFIX)
        return ColocatedTeacher(self.frozen(checkpoint, fp8=fp8), pairs)

    @property
    def teacher_checkpoint(self) -> ModelCheckpoint:
        """Checkpoint of the model that the student is distilled from."""
        return ModelCheckpoint(
            self.arch(self.recipe.distillation_teacher), self.paths[self.recipe.distillation_teacher]
        )

    def frozen(self, checkpoint: ModelCheckpoint, *, fp8: str | None) -> ShardedModel:
        """A teacher in this world's layout and the recipe's teacher precision, for forward passes."""
        return frozen_model(
            checkpoint,
            self.world,
            precision=self.recipe.teacher_precision,
            sequence_length=self.recipe.data.sequence_length,
            transformer_impl=self.recipe.transformer_impl,
            fp8=fp8,
        )

    def groups(
        self, part: str, num_samples: int, micro_batch_size: int, *, exact: bool
    ) -> tuple[int, Iterator[list[Batch]]]:
        """How many groups, and the groups: this data parallel rank's microbatches of a part of the text, enough to fill the pipeline.

        exact: InputError unless the samples divide; otherwise the last group is filled up with samples of zero loss_mask.
        """
        world, recipe = self.world, self.recipe
        dp, pp, interleaved = world.groups.dp.size(), world.parallel.pp, world.parallel.interleaved
        if exact and (
            problem := must_divide("score.num_samples", num_samples, micro_batch_size, dp, interleaved)
        ):
            raise InputError(problem)
        unit = micro_batch_size * dp * interleaved
        units = -(-num_samples // unit)
        size = unit * max(n for n in range(1, min(4 * pp, units) + 1) if not exact or units % n == 0)
        stage = "texts" if part in recipe.data.held_out else "data"
        corpus = Corpus(self.paths[stage], self.tokenizer(), recipe.data.sequence_length, recipe.seed)
        samples = open_samples(corpus, part, num_samples, repeat=False)
        sizes = {
            "global_batch_size": size,
            "micro_batch_size": micro_batch_size,
            "dp_rank": world.groups.dp.rank(),
            "dp_size": dp,
            "limit": num_samples,
        }
        count = -(-num_samples // size)
        return count, (micro_batches(samples, i, **sizes) for i in range(count))


def copy_assets_from(checkpoint_folder: Path) -> Callable[[Path], None]:
    """Copies the Hugging Face side files of a checkpoint artefact into the next one."""
    return lambda folder: shutil.copytree(checkpoint_folder / ASSETS, folder / ASSETS)


def training_samples(job: StageContext, settings: TrainingConfig) -> Dataset:
    """The samples of all steps, the same for every role."""
    corpus = Corpus(
        job.paths["data"],
        job.tokenizer(),
        job.recipe.data.sequence_length,
        job.recipe.seed,
        index_owner="teacher" if job.world.role == "teacher" else "",
    )
    return open_samples(corpus, "train", settings.steps * settings.global_batch_size, repeat=True)
