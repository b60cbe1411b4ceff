"""Which samples of the text a training step reads, if batches are skipped or their size changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch.utils.data import Dataset

from minitron_mp.artifacts.manifest import Change
from minitron_mp.config.training import TrainingConfig


@dataclass(frozen=True)
class SamplePositions:
    """The samples of each step: consecutive batches of the text, without the skipped ones.

    Batches count from 0. Without skipped batches, step n reads batch n. All positions are counted in
    samples, because the size of a batch may change between two steps.
    """

    sizes: tuple[tuple[int, int], ...]
    """(first step, samples per batch), in the order of the steps. The first one begins at step 0."""
    skipped: tuple[tuple[int, int], ...] = ()
    """(first, last) batch of each skipped range, in ascending order."""

    def batch(self, step: int) -> int:
        """Return the number of the batch that a step reads."""
        batch = step
        for first, last in self.skipped:
            if batch >= first:
                batch += last - first + 1
        return batch

    def first_sample(self, step: int) -> int:
        """Return the first sample of a step. A skipped batch has the size of the next one."""
        sample = done = 0
        starts = [*self.sizes[1:], (step + 1, 0)]
        for (_, size), (end, _) in zip(self.sizes, starts):
            if end > step:
                return sample + (self.batch(step) - done) * size
            batches = self.batch(end - 1) + 1
            sample, done = sample + (batches - done) * size, batches
        raise AssertionError("the last size has no end")

    def num_samples(self, steps: int) -> int:
        """Return the number of samples up to the last one of `steps` steps."""
        return self.first_sample(steps - 1) + self._size(steps - 1)

    def num_trained(self, steps: int) -> int:
        """Return the number of samples that `steps` steps read, without the skipped ones."""
        ends = [*(first for first, _ in self.sizes[1:]), steps]
        return sum(
            (min(end, steps) - first) * size for (first, size), end in zip(self.sizes, ends) if first < steps
        )

    def from_step(self, samples: Dataset, step: int) -> Dataset:
        """Return the samples, moved so that index step x batch size is the first one of the step."""
        offset = self.first_sample(step) - step * self._size(step)
        return _Moved(samples, offset) if offset else samples

    def _size(self, step: int) -> int:
        return [size for first, size in self.sizes if first <= step][-1]


class _Moved(Dataset):
    """Samples from an offset on. Index i is sample i + offset."""

    def __init__(self, samples: Dataset, offset: int):
        self.samples, self.offset = samples, offset

    def __getitem__(self, index: int) -> Any:
        return self.samples[index + self.offset]


def sample_positions(settings: TrainingConfig, changes: Sequence[Change]) -> SamplePositions:
    """Return the positions of a run with these settings. changes: those before them (Manifest)."""
    sizes = [change for change in changes if change.name == "global_batch_size"]
    first = sizes[0].old if sizes else settings.global_batch_size
    ranges = [(first - 1, last - 1) for first, last in settings.skip_batches]
    return SamplePositions(
        ((0, first), *((change.step, cast(int, change.new)) for change in sizes)), tuple(ranges)
    )
