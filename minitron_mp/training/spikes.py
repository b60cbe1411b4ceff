"""Find spikes of the training loss, for the log. A spike does not change the run."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 100
"""Steps with which a loss is compared."""

FEWEST = 20
"""Steps after which losses are compared."""

LIMIT = 6.0
"""Deviations above the median from which a loss is a spike."""

DEVIATION_OF_MAD = 1.4826
"""Standard deviation of normally distributed values, divided by their median absolute deviation."""

LEAST_DEVIATION = 0.005
"""Smallest deviation, relative to the median, for losses that hardly change."""


class SpikeWatch:
    """Compares each loss with the losses of the last WINDOW steps.

    Median and median absolute deviation do not change much with earlier spikes, unlike mean and
    standard deviation.
    """

    def __init__(self, losses: Iterable[float] = ()):
        self.losses = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def add(self, loss: float) -> float | None:
        """Return the median of the last steps if the loss is a spike, else None."""
        if not math.isfinite(loss):
            return None
        spike = None
        if len(self.losses) >= FEWEST:
            median = statistics.median(self.losses)
            mad = statistics.median(abs(value - median) for value in self.losses)
            deviation = max(DEVIATION_OF_MAD * mad, LEAST_DEVIATION * abs(median))
            if loss > median + LIMIT * deviation:
                spike = median
        self.losses.append(loss)
        return spike
