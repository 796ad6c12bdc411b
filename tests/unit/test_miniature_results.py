"""What the miniature's results take from an evaluation."""

from __future__ import annotations

from typing import Any

from distilled_t5.devtools.miniature_results import Row, asked_suite, entry, rows_of
from distilled_t5.evaluate.confidence import Score
from distilled_t5.miniature.measure import MEASURED
from distilled_t5.miniature.world import TASKS


def measured(value: float, n: int = 7) -> dict[str, Any]:
    return {"value": value, "n": n, "low": 0.0, "high": 1.0}


def test_rows_stand_in_the_order_of_the_encoders_with_counts_and_milliseconds():
    found = {
        "encoders": {"teacher": {}, "student": {}},
        "tasks": {"word": {"scores": {"readback": {"student": measured(3 / 7), "teacher": measured(1.0)}}}},
        "probes": {
            "cost": {"encode s": {"teacher": measured(0.25), "student": measured(0.125)}},
            "velocity_gap": {"sigma 0.00-1.00": {"student": measured(0.5)}},
        },
    }
    teacher, student = rows_of(found)
    assert (teacher.scores["word"], student.scores["word"]) == (Score(7, 7), Score(3, 7))
    assert (teacher.encode_ms, student.encode_ms) == (250.0, 125.0)
    assert teacher.probes["velocity_gap"] == {}
    assert student.probes["velocity_gap"] == {"sigma 0.00-1.00": measured(0.5)}


def test_a_student_is_told_with_its_share_and_without_its_costs():
    teacher = Row(dict.fromkeys(TASKS, Score(8, 8)), 5.0)
    student = Row(dict.fromkeys(TASKS, Score(6, 8)), None, {"cost": {"load s": measured(1)}, "collapse": {"effective rank": measured(9)}})
    told = entry("one", student, teacher, steps=3)
    assert (told["name"], told["steps"], told["share_of_teacher"], told["encode_ms"]) == ("one", 3, 0.75, None)
    assert list(told["probes"]) == ["collapse"]
    assert "share_of_teacher" not in entry("teacher", teacher, None)


def test_the_curve_paints_the_tasks_of_the_share_alone_and_probes_nothing():
    whole, curve = asked_suite(200, probes=True), asked_suite(25, probes=False)
    assert [task.name for task in whole.tasks] == list(MEASURED)
    assert whole.velocity_gap is not None
    assert [task.name for task in curve.tasks] == list(TASKS)
    assert {task.prompts.limit for task in curve.tasks} == {25}
    assert (curve.embedding, curve.velocity_gap, curve.latent_distance, curve.cost) == (None, None, None, None)
