"""What the miniature's results take from an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.miniature import MIDDLE
from distilled_t5.devtools.miniature_results import (
    Row,
    asked_suite,
    curve_files,
    curve_of,
    entry,
    pair,
    point,
    rows_of,
    share_interval,
    training_minutes,
    training_s,
)
from distilled_t5.evaluate.confidence import Score
from distilled_t5.miniature.measure import MEASURED
from distilled_t5.world.pictures import TASKS


def measured(value: float, n: int = 7) -> dict[str, Any]:
    return {"value": value, "n": n, "low": 0.0, "high": 1.0}


def test_rows_stand_in_the_order_of_the_encoders_with_counts_and_milliseconds(tmp_path):
    for encoder, right in (("teacher", 7), ("student", 3)):
        (tmp_path / encoder).mkdir()
        kept = {"found": {"readback": [1.0] * right + [0.0] * (7 - right)}}
        (tmp_path / encoder / "word.readback.json").write_text(json.dumps(kept), encoding="utf-8")
    found = {
        "encoders": {"teacher": {}, "student": {}},
        "tasks": {"word": {"scores": {"readback": {"student": measured(3 / 7), "teacher": measured(1.0)}}}},
        "probes": {
            "cost": {"encode s": {"teacher": measured(0.25), "student": measured(0.125)}},
            "velocity_gap": {"sigma 0.00-1.00": {"student": measured(0.5)}},
        },
    }
    teacher, student = rows_of(found, tmp_path)
    assert student.verdicts == {"word": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]}
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


def test_a_share_has_the_interval_of_questions_drawn_again_for_both():
    right = [1.0] * 90 + [0.0] * 10
    teacher = Row({}, verdicts=dict.fromkeys(TASKS, right))
    assert share_interval(teacher, teacher) == (1.0, 1.0), "the same verdicts on the same questions"
    student = Row({}, verdicts=dict.fromkeys(TASKS, [1.0] * 80 + [0.0] * 20))
    interval = share_interval(student, teacher)
    # Each of 6 tasks loses 10 of 100 questions: 600 pairs, deviation of the mean loss sqrt(0.1 * 0.9 / 600) = 0.0122, over 0.9.
    assert interval is not None
    assert interval[0] == pytest.approx(8 / 9 - 1.96 * 0.0122 / 0.9, abs=0.006)
    assert interval[1] == pytest.approx(8 / 9 + 1.96 * 0.0122 / 0.9, abs=0.006)
    assert share_interval(Row({}), teacher) is None


def test_a_student_with_nothing_right_has_a_share_and_no_interval():
    teacher, student = (Row({}, verdicts=dict.fromkeys(TASKS, right)) for right in ([1.0, 1.0, 0.0], [0.0] * 3))
    assert share_interval(student, teacher) is None


def test_a_pair_tells_the_difference_on_the_same_questions_with_an_interval_narrower_than_that_of_a_share():
    def of(right: list[float]) -> Row:
        return Row(dict.fromkeys(TASKS, Score(int(sum(right)), len(right))), verdicts=dict.fromkeys(TASKS, right))

    teacher, following, naive = of([1.0] * 100), of([1.0] * 60 + [0.0] * 40), of([1.0] * 55 + [0.0] * 45)
    told = pair(1, following, naive, teacher, (38.0, None))
    assert (told["seed"], told["following"], told["naive"], told["difference"], told["n"]) == (1, 0.6, 0.55, 0.05, 100)
    # In each of 6 tasks 5 of 100 questions: 600 pairs, deviation of the mean difference sqrt(0.05 * 0.95 / 600) = 0.0089.
    assert told["interval"] == pytest.approx((0.05 - 1.96 * 0.0089, 0.05 + 1.96 * 0.0089), abs=0.004)
    assert told["minutes"] == [38.0, None]
    assert pair(1, Row(following.scores), naive, teacher, (None, None))["interval"] is None


def run_with_checkpoints(work: Path, *steps: int) -> Path:
    run = work / "runs" / MIDDLE
    for count in steps:
        (run / "checkpoints" / f"step-{count:06d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{count:06d}" / "student.safetensors").touch()
    (run / "recipe.toml").write_text("[[stage]]\nbatch = 32\n", encoding="utf-8")
    rows = [
        {"step": 1, "loss": 1.0, "samples_per_s": 64.0},
        {"step": 1, "held_out_loss": 1.0},
        {"step": 2, "loss": 1.0, "samples_per_s": 16.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return run


def test_the_curve_has_every_second_point_of_imitation_and_every_point_of_following(tmp_path):
    run_with_checkpoints(tmp_path, 500, 1000, 1500, 4500, 5000, 5500, 7000)
    assert [int(file.parent.name[5:]) for file in curve_files(tmp_path)] == [1000, 5000, 5500, 7000]
    assert curve_files(tmp_path / "elsewhere") == []


def test_a_trial_without_checkpoints_does_not_tell_the_kept_curve_as_its_own(tmp_path):
    assert curve_of(tmp_path, tmp_path, 1) == []


def test_a_point_tells_steps_seconds_of_training_and_share(tmp_path):
    run = run_with_checkpoints(tmp_path, 2)
    assert (training_s(run, 1), training_s(run, 2), training_s(run)) == (0.5, 2.5, 2.5)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 3, "loss": 1.0, "samples_per_s": 0.16}) + "\n")  # 200 s more
    assert (training_minutes(tmp_path, MIDDLE), training_minutes(tmp_path, "elsewhere")) == (3.4, None)
    file = run / "checkpoints" / "step-000002" / "student.safetensors"
    told = point(file, Row(dict.fromkeys(TASKS, Score(2, 4))), Row(dict.fromkeys(TASKS, Score(4, 4))))
    assert told == {"steps": 2, "training_s": 2.5, "share_of_teacher": 0.5, "share_interval": None, "n": 4}


def test_the_curve_paints_the_tasks_of_the_share_alone_and_probes_nothing():
    whole, curve = asked_suite(200, probes=True), asked_suite(25, probes=False)
    assert [task.name for task in whole.tasks] == list(MEASURED)
    assert whole.velocity_gap is not None
    assert [task.name for task in curve.tasks] == list(TASKS)
    assert {task.prompts.limit for task in curve.tasks} == {25}
    assert (curve.embedding, curve.velocity_gap, curve.latent_distance, curve.cost) == (None, None, None, None)
