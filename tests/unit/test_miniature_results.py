"""miniature/results.json holds an evaluation's numbers, and shares of the teacher with intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distilled_t5.devtools.miniature_results import MIDDLE, TEACHER, UNTRAINED, numbers, pair, results, share, training_s, verdicts_of
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.world.pictures import TASKS

FILES = SHIPPED / "text_encoders"


def measured(value: float, n: int = 7) -> dict[str, Any]:
    return {"value": value, "n": n, "low": 0.0, "high": 1.0}


def right(*counts: int, of: int = 100) -> np.ndarray:
    """Verdicts [T, N] in which the first `count` images of each task are right; one count stands for all tasks."""
    return np.array([[1.0] * count + [0.0] * (of - count) for count in (counts if len(counts) > 1 else counts * len(TASKS))])


def write_evaluation(work: Path, **right_of_7: int) -> None:
    """An evaluation's folder with as many right images of seven for each encoder."""
    for name, count in right_of_7.items():
        (work / "evaluation" / "scores" / name).mkdir(parents=True)
        for task in TASKS:
            kept = {"found": {"readback": [1.0] * count + [0.0] * (7 - count)}}
            (work / "evaluation" / "scores" / name / f"{task}.readback.json").write_text(json.dumps(kept), encoding="utf-8")
    found = {
        "made": {"commit": "abc"},
        "encoders": {name: {} for name in right_of_7},
        "tasks": {task: {"scores": {"readback": {name: measured(count / 7) for name, count in right_of_7.items()}}} for task in TASKS},
        "probes": {
            "cost": {"encode s": dict.fromkeys(right_of_7, measured(0.125))},
            "collapse": {"effective rank": dict.fromkeys(right_of_7, measured(9))},
            "velocity_gap": {"sigma 0.00-1.00": {name: measured(0.5) for name in right_of_7 if name != TEACHER}},
        },
    }
    (work / "evaluation" / "results.json").write_text(json.dumps(found), encoding="utf-8")


def test_results_have_each_encoder_with_its_share_and_a_curve_of_checkpoints(tmp_path):
    checkpoint = f"{MIDDLE}_step-000002"
    write_evaluation(tmp_path, **{TEACHER: 7, MIDDLE: 6, UNTRAINED: 0, checkpoint: 3})
    write_run(tmp_path)
    shipped = FILES / f"{MIDDLE}.safetensors"
    found = results(tmp_path, "evaluate", dict.fromkeys((MIDDLE, UNTRAINED, checkpoint), shipped), {MIDDLE: "velocity"})
    teacher, middle, untrained = found["encoders"]
    assert [one["name"] for one in found["encoders"]] == [TEACHER, MIDDLE, UNTRAINED]
    assert "share" not in teacher
    assert (middle["objective"], untrained["objective"]) == ("velocity", "none")
    assert (middle["share"]["value"], middle["share"]["n"]) == (0.8571, 7)
    assert untrained["share"] == {"value": 0.0, "n": 7, "low": None, "high": None}, "no interval where all resamples are equal"
    assert middle["bytes"] == shipped.stat().st_size
    assert (middle["steps"], middle["parameters_without_tokens"]) == (7000, 312_496)
    [point] = found["curve"]
    assert (point["steps"], point["training_s"], point["share"]["value"]) == (2, 2.5, 0.4286)
    assert (found["command"], found["made"], found["pairs"]) == ("evaluate", {"commit": "abc"}, [])


def test_numbers_are_those_of_the_evaluation(tmp_path):
    write_evaluation(tmp_path, **{TEACHER: 7, MIDDLE: 3})
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text(encoding="utf-8"))
    teacher, middle = (numbers(found, name) for name in (TEACHER, MIDDLE))
    assert middle["tasks"] == dict.fromkeys(TASKS, measured(3 / 7))
    assert middle["encode_ms"] == 125.0
    assert middle["probes"] == {"collapse": {"effective rank": measured(9)}, "velocity_gap": {"sigma 0.00-1.00": measured(0.5)}}
    assert teacher["probes"]["velocity_gap"] == {}
    assert verdicts_of(tmp_path / "evaluation", MIDDLE).sum(axis=1).tolist() == [3] * len(TASKS)


def test_a_teacher_without_a_right_image_is_an_error(tmp_path):
    write_evaluation(tmp_path, **{TEACHER: 0})
    with pytest.raises(ValueError, match="no image right"):
        results(tmp_path, "evaluate", {}, {})


def test_a_share_has_the_interval_of_questions_drawn_again_for_both():
    assert share(right(90), right(90)) == {"value": 1.0, "n": 100, "low": None, "high": None}, "equal verdicts on the same questions"
    found = share(right(80), right(90))
    # Each of 6 tasks loses 10 of 100 questions: 600 pairs, deviation of the mean loss sqrt(0.1 * 0.9 / 600) = 0.0122, over 0.9.
    assert found["low"] == pytest.approx(8 / 9 - 1.96 * 0.0122 / 0.9, abs=0.006)
    assert found["high"] == pytest.approx(8 / 9 + 1.96 * 0.0122 / 0.9, abs=0.006)


def test_a_pair_has_the_difference_on_the_same_questions_with_its_interval(tmp_path):
    found = pair(1, "a", "b", {TEACHER: right(100), "a": right(60), "b": right(55)}, tmp_path)
    assert (found["seed"], found["following"], found["naive"], found["minutes"]) == (1, 0.6, 0.55, [None, None])
    assert (found["difference"]["value"], found["difference"]["n"]) == (0.05, 100)
    # In each of 6 tasks 5 of 100 questions: 600 pairs, deviation of the mean difference sqrt(0.05 * 0.95 / 600) = 0.0089.
    assert found["difference"]["low"] == pytest.approx(0.05 - 1.96 * 0.0089, abs=0.004)
    assert found["difference"]["high"] == pytest.approx(0.05 + 1.96 * 0.0089, abs=0.004)


def write_run(work: Path) -> None:
    """A run of the middle student of two steps, with a validation in between."""
    run = work / "runs" / MIDDLE
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text("[[stage]]\nbatch = 32\n", encoding="utf-8")
    rows = [
        {"step": 1, "loss": 1.0, "samples_per_s": 64.0},
        {"step": 1, "held_out_loss": 1.0},
        {"step": 2, "loss": 1.0, "samples_per_s": 16.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def test_seconds_of_training_are_those_of_the_steps_alone(tmp_path):
    write_run(tmp_path)
    assert (training_s(tmp_path, MIDDLE, 1), training_s(tmp_path, MIDDLE)) == (0.5, 2.5)
    assert training_s(tmp_path, "another") is None
