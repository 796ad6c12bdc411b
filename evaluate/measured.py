"""A value with the number of samples behind it and its 95 % interval, by scipy."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# scipy takes two seconds to import, so only functions that need it import it.
Z_95 = 1.959964
SHARE = 0.95
RESAMPLES = 2000
# Of fewer values the bootstrap gives too narrow an interval; Student's t does not.
BOOTSTRAP_FROM = 10
# Parts of the samples that are left out in turn.
JACKKNIFE_PARTS = 20


@dataclass(frozen=True)
class Measured:
    """A value from `n` samples and its 95 % interval; the bounds are None where no interval is known."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None

    @classmethod
    def with_deviation(cls, value: float, n: int, deviation: float) -> Measured:
        """A value with the interval of a normal distribution of this standard deviation."""
        return cls(value, n, value - Z_95 * deviation, value + Z_95 * deviation)

    def to_json(self) -> dict[str, Any]:
        """For results.json; `Measured(**content)` reads it back."""
        return dataclasses.asdict(self)


def exact(value: float) -> Measured:
    """A number that was not sampled, such as a size in bytes."""
    return Measured(value, 1, value, value)


def mean(values: Sequence[float]) -> Measured:
    """The mean, with Wilson's interval where all values are 0 or 1, Student's of fewer than ten values, else the bootstrap's.

    Raises ValueError if there is no value or one is not finite.
    """
    if values and set(values) <= {0.0, 1.0}:
        right = int(sum(values))
        return Measured(right / len(values), len(values), *_wilson(right, len(values)))
    return _mean(values)


def mean_difference(values: Sequence[float]) -> Measured:
    """The mean of differences between two encoders on the same prompts and seeds, with Student's or the bootstrap's interval.

    Where no pair differs, the interval is Wilson's bound on the share of pairs that might. Raises ValueError as `mean` does.
    """
    if values and not any(values):
        reach = _wilson(0, len(values))[1]
        return Measured(0.0, len(values), -reach, reach)
    return _mean(values)


def _wilson(right: int, n: int) -> tuple[float, float]:
    from scipy import stats

    low, high = stats.binomtest(right, n).proportion_ci(SHARE, method="wilson")
    return float(low), float(high)


def _mean(values: Sequence[float]) -> Measured:
    from scipy import stats

    samples = np.asarray(values, dtype=np.float64)
    if not len(samples) or not np.isfinite(samples).all():
        raise ValueError(
            f"A mean needs at least one value, all of them finite: got {len(samples)}, {int((~np.isfinite(samples)).sum())} of them NaN or "
            "infinite.\nWhat to do: check the encoder's file; NaN in an image or an embedding comes from broken weights."
        )
    n = len(samples)
    if n == 1:
        return Measured(float(samples[0]), 1)
    if n < BOOTSTRAP_FROM:
        value, reach = statistics.fmean(values), float(stats.t.ppf((1 + SHARE) / 2, n - 1) * stats.sem(samples))
        return Measured(value, n, value - reach, value + reach)
    random = np.random.default_rng(0)
    found = stats.bootstrap(
        (samples,), np.mean, n_resamples=RESAMPLES, confidence_level=SHARE, method="percentile", batch=100, random_state=random
    )
    return Measured(float(samples.mean()), n, float(found.confidence_interval.low), float(found.confidence_interval.high))


def jackknife(samples: np.ndarray, statistic: Callable[[np.ndarray], float], parts: int = JACKKNIFE_PARTS) -> Measured:
    """A statistic of all samples [N, ...], with the interval from leaving out one part of them after the other (Tukey 1958)."""
    count = len(samples)
    parts = min(parts, count)
    value = statistic(samples)
    if parts < 3:
        return Measured(value, count)
    # Shuffled: samples alternate between tasks, and a part must not hold those of a few tasks only.
    numbers = np.random.default_rng(0).permutation(count) % parts
    without = [statistic(samples[numbers != part]) for part in range(parts)]
    return Measured.with_deviation(value, count, math.sqrt((parts - 1) * statistics.pvariance(without)))
