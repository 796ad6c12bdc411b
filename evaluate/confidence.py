"""How far a number can be trusted: every mean comes with its sample count and a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z_95 = 1.959964
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """Right pictures of how many, and Wilson's 95 % interval of their share (Wilson 1927)."""

    right: int
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        share, spread = self.accuracy, Z_95**2 / self.n
        middle = (share + spread / 2) / (1 + spread)
        reach = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / self.n + spread / (4 * self.n))
        return max(middle - reach, 0.0), min(middle + reach, 1.0)

    def to_json(self) -> dict[str, Any]:
        """For results.json."""
        low, high = self.interval
        return {"accuracy": round(self.accuracy, 4), "n": self.n, "low": round(low, 4), "high": round(high, 4)}


@dataclass(frozen=True)
class Estimate:
    """A mean over n samples, and its 95 % interval."""

    mean: float
    n: int
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """For results.json, with six significant digits."""
        return {"mean": _short(self.mean), "n": self.n, "low": _short(self.low), "high": _short(self.high)}


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of samples [n] with the 95 % interval of means of resamples (Efron 1979's percentiles); the same for the same seed.

    For two encoders on the same prompts and seeds, give the differences. Raises ValueError if there is no sample or one is not finite.
    """
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        bad = int((~np.isfinite(samples)).sum())
        raise ValueError(
            f"A mean needs at least one sample, all of them finite; {list(samples.shape)} came, {bad} of them NaN or infinity.\n"
            "What to do: score at least one picture, and leave out what could not be scored."
        )
    random = np.random.default_rng(seed)
    means = [random.choice(samples, len(samples)).mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(samples.mean()), len(samples), float(low), float(high))
