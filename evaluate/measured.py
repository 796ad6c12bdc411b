"""A value with the number of samples behind it and its 95 % interval, by scipy."""

from __future__ import annotations

import dataclasses
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """A value from `n` samples and its 95 % interval; the bounds are None where no interval is known.

    identical: a share of scores that are the teacher's, one by one.
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    identical: bool = False

    @classmethod
    def with_deviation(cls, value: float, n: int, deviation: float) -> Measured:
        """A value with the interval of a normal distribution of this standard deviation."""
        return cls(value, n, value - Z_95 * deviation, value + Z_95 * deviation)

    def within(self, least: float, most: float) -> Measured:
        """The same, its interval cut to what the number can be."""
        return self if self.low is None or self.high is None else replace(self, low=max(self.low, least), high=min(self.high, most))

    def to_json(self) -> dict[str, Any]:
        """For results.json; `Measured(**content)` reads it back."""
        return {name: part for name, part in dataclasses.asdict(self).items() if part is not False}


def exact(value: float) -> Measured:
    """A number that was not sampled, such as a size in bytes."""
    return Measured(value, 1, value, value)


def mean(values: Sequence[float]) -> Measured:
    """The mean, with Student's interval of fewer than ten values, else the bootstrap's.

    Equal values say nothing about others, so they have no interval. Raises ValueError if there is no value or one is not finite.
    """
    from scipy import stats

    samples = np.asarray(values, dtype=np.float64)
    if not len(samples) or not np.isfinite(samples).all():
        raise ValueError(
            f"A mean needs at least one value, all of them finite: got {len(samples)}, {int((~np.isfinite(samples)).sum())} of them NaN or "
            "infinite.\nWhat to do: check the encoder's file; NaN in an image or an embedding comes from broken weights."
        )
    n = len(samples)
    if len(set(values)) == 1:
        return Measured(float(samples[0]), n)
    if n < BOOTSTRAP_FROM:
        value, reach = statistics.fmean(values), float(stats.t.ppf((1 + SHARE) / 2, n - 1) * stats.sem(samples))
        return Measured(value, n, value - reach, value + reach)
    random = np.random.default_rng(0)
    found = stats.bootstrap(
        (samples,), np.mean, n_resamples=RESAMPLES, confidence_level=SHARE, method="percentile", batch=100, random_state=random
    )
    return Measured(float(samples.mean()), n, float(found.confidence_interval.low), float(found.confidence_interval.high))


def proportion(values: Sequence[float]) -> Measured:
    """The mean of proportions of success, with Wilson's interval where all of them are 0 or 1; else, and in errors, as `mean`."""
    if values and set(values) <= {0.0, 1.0}:
        right = int(sum(values))
        return Measured(right / len(values), len(values), *_wilson(right, len(values)))
    return mean(values)


def share(student: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]]) -> Measured:
    """A student's scores as a share of the teacher's: of the sums of the means of all tasks, on the same prompts and seeds.

    The interval is the bootstrap's, with the prompts of each task drawn again for both. There is none of identical scores, of fewer than
    ten prompts, of a task with a single one, or where all resamples are equal.
    """
    from scipy import stats

    both = [[np.asarray(values, dtype=np.float64) for values in encoder] for encoder in (student, teacher)]
    places = [np.arange(len(values)) for values in student]

    def ratio(*drawn: np.ndarray, axis: int = -1) -> Any:
        one, other = (sum(values[at].mean(axis=axis) for values, at in zip(encoder, drawn, strict=True)) for encoder in both)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(one, other)

    value, n = float(ratio(*places)), sum(map(len, places))
    identical = all(map(np.array_equal, *both))
    if identical or n < BOOTSTRAP_FROM or min(map(len, places)) < 2:
        return Measured(value, n, identical=identical)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a teacher who is wrong in all of a resample
        found = stats.bootstrap(
            places, ratio, n_resamples=RESAMPLES, method="percentile", vectorized=True, batch=100, random_state=np.random.default_rng(0)
        )
    low, high = map(float, found.confidence_interval)
    return Measured(value, n, low, high) if math.isfinite(high) and low < high else Measured(value, n)


def _wilson(right: int, n: int) -> tuple[float, float]:
    from scipy import stats

    low, high = stats.binomtest(right, n).proportion_ci(SHARE, method="wilson")
    return float(low), float(high)


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
