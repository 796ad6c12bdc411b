"""The time that a run still takes: each stage at its own cost, validations, previews and checkpoints included."""

from __future__ import annotations

import pytest
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.time_left import Cost, TimeLeft


def test_a_stage_that_has_not_begun_counts_at_the_cost_of_its_trial_and_then_at_its_own():
    left = TimeLeft([100, 50], {}, in_trial={1: 4.0})
    assert left.seconds(0) is None, "nothing of stage 1 is known yet"
    left.step(0, 0.1)
    assert left.seconds(10) == pytest.approx(90 * 0.1 + 50 * 4)
    left.step(1, 3.0)
    assert left.seconds(110) == pytest.approx(40 * 3)
    assert left.seconds(150) == 0


def test_events_count_as_often_as_they_still_come_and_at_the_last_step():
    left = TimeLeft([100], {"validation": 30})
    left.step(0, 0.0)
    left.event("validation", 7.0)
    # After 30, 60, 90, and after the last step.
    assert [left.seconds(step) for step in (0, 29, 30, 90, 99, 100)] == [28, 28, 21, 7, 7, 0]


def test_the_first_measurement_counts_only_until_there_is_another_one():
    cost = Cost()
    assert cost.mean_s is None
    cost.add(60)
    assert cost.mean_s == 60
    cost.add(1)
    cost.add(3)
    assert cost.mean_s == 2


def test_a_recipe_without_a_vae_makes_no_previews():
    assert set(TimeLeft.of(load_recipe("smoke")).every) == {"validation", "checkpoint"}
    assert TimeLeft.of(load_recipe("miniature-quarter")).every == {"validation": 400, "checkpoint": 800, "preview": 800}
