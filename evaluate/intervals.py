"""Numbers with what they are worth: a value, how many samples it is from, and its 95 % interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..miniature.measure import Score

CONFIDENCE = 0.95
# Parts of the samples that are left out one after the other to see how much a statistic moves.
JACKKNIFE_PARTS = 20


@dataclass(frozen=True)
class Measured:
    """A number from `n` samples; its 95 % interval, None where one cannot be known."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Measured:
        """What `to_json` gave."""
        return cls(content["value"], content["n"], content["low"], content["high"])


def exact(value: float) -> Measured:
    """A number that was not sampled, such as a size."""
    return Measured(value, 1, value, value)


def mean_of(values: Sequence[float]) -> Measured:
    """The mean, with Wilson's interval where all values are 0 or 1, else with Student's."""
    if not values:
        raise ValueError("A mean needs at least one value; none came.\nWhat to do: give the task at least one prompt.")
    count = len(values)
    if set(values) <= {0.0, 1.0}:
        score = Score(int(sum(values)), count)
        return Measured(score.accuracy, count, *score.interval)
    mean = statistics.fmean(values)
    if count < 2:
        return Measured(mean, count)
    reach = _student(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Measured(mean, count, mean - reach, mean + reach)


def jackknife(samples: np.ndarray, statistic: Callable[[np.ndarray], float], parts: int = JACKKNIFE_PARTS) -> Measured:
    """A statistic of all samples [N, ...], with the interval that leaving out one part of them after the other gives (Tukey 1958)."""
    count = len(samples)
    parts = min(parts, count)
    value = statistic(samples)
    if parts < 3:
        return Measured(value, count)
    numbers = np.arange(count) % parts
    without = [statistic(samples[numbers != part]) for part in range(parts)]
    spread = math.sqrt((parts - 1) / parts * sum((one - statistics.fmean(without)) ** 2 for one in without))
    reach = _student(parts - 1) * spread
    return Measured(value, count, value - reach, value + reach)


def _student(freedom: int) -> float:
    """How many standard errors the interval reaches to either side."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))
