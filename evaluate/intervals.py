"""Numbers with what they are worth: a value, how many samples it is from, and its 95 % interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .confidence import Z_95, Score, bootstrap_mean

# Parts of the samples that are left out one after the other to see how much a statistic moves.
JACKKNIFE_PARTS = 20
# Student's t of 97.5 % for 1, 2, 3 ... degrees of freedom: of few values the bootstrap gives too narrow an interval.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)


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
    """The mean, with Wilson's interval where all values are 0 or 1, else Student's of up to nine values and the bootstrap's of more.

    Raises ValueError if there is no value.
    """
    if values and set(values) <= {0.0, 1.0}:
        score = Score(int(sum(values)), len(values))
        return Measured(score.accuracy, score.n, *score.interval)
    return _mean(values)


def mean_of_differences(values: Sequence[float]) -> Measured:
    """The mean of differences between two encoders on the same prompts, with Student's or the bootstrap's interval.

    Where no pair differs, Wilson's bound on how many might, to either side. Raises ValueError if there is no value.
    """
    if values and not any(values):
        reach = Score(0, len(values)).interval[1]
        return Measured(0.0, len(values), -reach, reach)
    return _mean(values)


def _mean(values: Sequence[float]) -> Measured:
    if len(values) == 1:
        return Measured(values[0], 1)
    if 1 < len(values) <= len(STUDENT_T) + 1:
        middle = statistics.fmean(values)
        reach = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
        return Measured(middle, len(values), middle - reach, middle + reach)
    estimate = bootstrap_mean(values)
    return Measured(estimate.mean, estimate.n, estimate.low, estimate.high)


def jackknife(samples: np.ndarray, statistic: Callable[[np.ndarray], float], parts: int = JACKKNIFE_PARTS) -> Measured:
    """A statistic of all samples [N, ...], with the interval that leaving out one part of them after the other gives (Tukey 1958)."""
    count = len(samples)
    parts = min(parts, count)
    value = statistic(samples)
    if parts < 3:
        return Measured(value, count)
    # Shuffled: samples come of all tasks in turn, and a part shall not be of a few tasks alone.
    numbers = np.random.default_rng(0).permutation(count) % parts
    without = [statistic(samples[numbers != part]) for part in range(parts)]
    middle = statistics.fmean(without)
    reach = Z_95 * math.sqrt((parts - 1) / parts * sum((one - middle) ** 2 for one in without))
    return Measured(value, count, value - reach, value + reach)
