"""Values with their intervals: Wilson's, Student's and the jackknife's by hand, the bootstrap's against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from distilled_t5.evaluate.measured import Measured, exact, jackknife, mean, proportion, share


def test_a_share_has_wilsons_interval():
    """z^2 = 3.8415. 0 of 10 and 10 of 10: z^2 / (n + z^2) = 0.2775 from the end."""
    assert proportion([0.0] * 10) == Measured(0.0, 10, 0.0, pytest.approx(0.27753, abs=1e-5))  # type: ignore[arg-type]
    assert proportion([1.0] * 10).low == pytest.approx(1 - 0.27753, abs=1e-5)
    measured = proportion([1.0, 1.0, 0.0, 1.0])
    # Middle (0.75 + 0.4802) / 1.9604, reach 1.96 / 1.9604 * sqrt(0.1875 / 4 + 3.8415 / 64).
    assert (measured.value, measured.n) == (0.75, 4)
    assert (measured.low, measured.high) == (pytest.approx(0.3006, abs=1e-3), pytest.approx(0.9544, abs=1e-3))


def test_few_values_have_students_interval_and_a_single_value_has_none():
    values = [0.2, 0.4, 0.3, 0.6, 0.1, 0.5, 0.35, 0.45]
    measured = mean(values)
    assert measured.value == pytest.approx(0.3625) and measured.n == 8
    # The deviation is 0.16202, over the root of 8; Student's t of 7 degrees of freedom is 2.3646.
    reach = 2.3646 * 0.16202 / 8**0.5
    assert (measured.low, measured.high) == (pytest.approx(0.3625 - reach, abs=1e-4), pytest.approx(0.3625 + reach, abs=1e-4))
    assert proportion(values) == measured, "such as shares of characters"
    assert mean([0.5, 0.5, 0.5]) == Measured(0.5, 3), "equal values say nothing about others"
    assert mean([0.5]) == Measured(0.5, 1)
    assert exact(7) == Measured(7, 1, 7, 7)


def test_the_bootstraps_interval_is_that_of_the_normal_distribution_for_many_values():
    samples = np.random.default_rng(5).normal(3, 2, size=400)
    found = mean(samples.tolist())
    reach = 1.96 * samples.std() / math.sqrt(400)
    assert (found.value, found.n) == (float(samples.mean()), 400)
    assert found.low == pytest.approx(samples.mean() - reach, abs=0.03)
    assert found.high == pytest.approx(samples.mean() + reach, abs=0.03)
    assert mean(samples.tolist()) == found, "the same values give the same interval"
    assert mean([0.25] * 12) == Measured(0.25, 12)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match=r"at least one value(.|\n)*What to do"):
        mean(values)
    with pytest.raises(ValueError, match=r"at least one value(.|\n)*What to do"):
        proportion(values)


def test_differences_and_gaps_are_not_shares():
    assert mean([0.0] * 10) == Measured(0.0, 10), "an identical student has no gap, and not one of up to 0.278"
    assert mean([0.0] * 200) == Measured(0.0, 200), "identical results have no interval"
    assert mean([1.0] * 4) == Measured(1.0, 4)
    few = mean([1.0] * 3 + [0.0] * 197)
    assert few.value == pytest.approx(0.015) and few.low == pytest.approx(0.0, abs=0.006)
    mixed = mean([1.0] * 3 + [-1.0] + [0.0] * 196)
    assert mixed.low is not None and mixed.high is not None and mixed.low < 0 < mixed.high
    assert mean([0.5, 0.7]).low == pytest.approx(0.6 - 12.706 * 0.1, abs=1e-3)


def test_an_interval_is_cut_to_what_a_number_can_be():
    assert mean([1.0, 1.0, 1.0, 0.0]).within(-1.0, 1.0) == Measured(0.75, 4, pytest.approx(-0.0456, abs=1e-3), 1.0)  # type: ignore[arg-type]
    assert Measured(0.5, 1).within(0.0, 1.0) == Measured(0.5, 1)


def test_a_share_has_the_interval_of_prompts_drawn_again_for_both():
    right, half = [1.0] * 200, [1.0, 0.0] * 100
    assert share([right], [right]) == Measured(1.0, 200, identical=True), "identical results have no interval"
    # The ratio's standard error is that of a share of 200: sqrt(0.25 / 200).
    found = share([half], [right])
    assert (found.value, found.n) == (0.5, 200)
    assert found.low == pytest.approx(0.5 - 1.96 * 0.03536, abs=0.01) and found.high == pytest.approx(0.5 + 1.96 * 0.03536, abs=0.01)
    # Of two tasks the means are added, however many prompts each has.
    assert share([half, right[:10]], [right, right[:10]]).value == 0.75
    both = share([half], [half])
    assert both == Measured(1.0, 200, identical=True), "the same prompts are drawn for both"


def test_a_share_of_few_prompts_or_of_a_teacher_that_may_be_all_wrong_has_no_interval():
    assert share([[1.0, 0.0]], [[1.0, 1.0]]) == Measured(0.5, 2)
    one_less = [1.0] * 19 + [0.0]
    assert share([one_less, [1.0]], [one_less[::-1], [1.0]]) == Measured(1.0, 21), "a task with a single prompt, and not identical"
    assert share([[1.0] + [0.0] * 11], [[0.0] * 11 + [1.0]]) == Measured(1.0, 12)


def test_the_jackknife_does_not_mistake_the_order_of_tasks_for_noise():
    """8 tasks in turn, each of its own level: the mean's error is that of noise within tasks and between samples, not of 2 tasks a part."""
    random = np.random.default_rng(1)
    samples = np.tile(np.arange(8.0) * 10, 100)[:, None] + random.normal(size=(800, 1))
    measured = jackknife(samples, lambda part: float(part.mean()))
    assert measured.high is not None
    assert measured.high - measured.value == pytest.approx(1.96 * float(samples.std()) / 800**0.5, rel=0.5)


def test_the_jackknife_of_a_mean_is_the_means_own_standard_error():
    samples = np.array([[1.0], [2.0], [4.0], [7.0]])
    measured = jackknife(samples, lambda part: float(part.mean()), parts=4)
    # The deviation of 1, 2, 4, 7 is 2.6458, over the root of 4 samples.
    assert (measured.value, measured.n) == (3.5, 4)
    assert measured.high is not None and measured.high - 3.5 == pytest.approx(1.96 * 2.6458 / 2, abs=1e-3)
    assert jackknife(samples[:2], lambda part: float(part.mean())) == Measured(1.5, 2)


def test_measured_numbers_come_back_from_json():
    measured = mean([0.1, 0.2])
    assert measured.to_json().keys() == {"value", "n", "low", "high"}
    assert Measured(**measured.to_json()) == measured
    same = share([[1.0]], [[1.0]])
    assert Measured(**same.to_json()) == same and same.identical
