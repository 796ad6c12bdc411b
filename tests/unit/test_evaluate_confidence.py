"""Intervals: Wilson's by hand, the bootstrap's against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from distilled_t5.evaluate.confidence import Estimate, Score, bootstrap_mean


def test_wilsons_interval_by_hand():
    """0 of 10 and 10 of 10: z^2 / (n + z^2) = 0.2775 from the end; 5 of 10 lies even."""
    assert Score(0, 10).interval == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert Score(10, 10).interval == pytest.approx((1 - 0.27753, 1.0), abs=1e-5)
    low, high = Score(5, 10).interval
    assert low + high == pytest.approx(1.0)
    assert (low, high) == pytest.approx((0.23659, 0.76341), abs=1e-5)


def test_a_score_as_json():
    assert Score(5, 10).to_json() == {"accuracy": 0.5, "n": 10, "low": 0.2366, "high": 0.7634}


def test_the_bootstraps_interval_is_that_of_the_normal_distribution_for_many_samples():
    samples = np.random.default_rng(5).normal(3, 2, size=400)
    found = bootstrap_mean(samples)
    reach = 1.96 * samples.std() / math.sqrt(400)
    assert (found.mean, found.n) == (pytest.approx(samples.mean()), 400)
    assert found.low == pytest.approx(samples.mean() - reach, abs=0.02)
    assert found.high == pytest.approx(samples.mean() + reach, abs=0.02)
    assert bootstrap_mean(samples) == found
    assert bootstrap_mean(samples, seed=1) != found


def test_few_samples_by_hand():
    """Of two samples 0 and 1 a quarter of all resamples is 0, 0 and a quarter 1, 1: the interval is all there is."""
    assert bootstrap_mean([0, 1]) == Estimate(0.5, 2, 0.0, 1.0)
    assert bootstrap_mean([0.25]) == Estimate(0.25, 1, 0.25, 0.25)
    assert bootstrap_mean([1 / 3]).to_json() == {"mean": 0.333333, "n": 1, "low": 0.333333, "high": 0.333333}


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [[0.5]], [math.inf]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match=r"at least one sample(.|\n)*What to do"):
        bootstrap_mean(values)
