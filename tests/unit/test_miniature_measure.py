"""Measuring the miniature: questions, scores, intervals, shares."""

from __future__ import annotations

import numpy as np
import pytest
from distilled_t5.evaluate.confidence import Score
from distilled_t5.miniature.measure import MEASURED, score, share_of, table
from distilled_t5.world.captions import draw_prompt
from distilled_t5.world.pictures import TASKS, render
from distilled_t5.world.questions import questions
from distilled_t5.world.scenes import NEW_IN_TASK, new_kinds


def test_a_painter_that_draws_what_is_asked_is_always_right_and_one_that_draws_the_next_question_hardly_ever():
    for task in ("single_object", "two_words", "new_word"):
        asked = questions(task, 12)
        pictures = np.stack([render(scene) for scene, _ in asked])
        assert score(lambda captions, seeds, pictures=pictures: pictures, task, 12).right == 12
        assert score(lambda captions, seeds, pictures=pictures: np.roll(pictures, 1, axis=0), task, 12).right <= 1


def test_questions_are_held_out_and_no_training_seed_draws_them():
    for task in MEASURED:
        for scene, _ in questions(task, 20):
            assert new_kinds(scene) == {NEW_IN_TASK[task]}
    assert questions("word", 5) != [draw_prompt(0, index, "held_out", "word") for index in range(5)]


def test_the_share_of_the_teacher_is_of_the_mean_over_tasks_with_a_floor():
    teacher = {task: Score(8, 10) for task in TASKS} | {"new_word": Score(0, 10)}
    student = {task: Score(4, 10) for task in TASKS} | {"new_word": Score(10, 10)}
    assert share_of(student, teacher) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="got no picture right"):
        share_of(student, {task: Score(0, 10) for task in TASKS})
    assert "| half | 40.0 |" in table({"half": student})
