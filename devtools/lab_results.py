"""What the finished runs of the lab show: each arm's share of the teacher over its seeds, and the differences that answer the questions."""

# S seeds, T tasks, N questions

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluate.measured import proportion
from ..world.pictures import TASKS
from .commands import ROOT
from .lab_arms import Arm, Lab
from .lab_run import Run
from .miniature_results import TEACHER, Verdicts, share, training_s, verdicts_of

RESULTS = ROOT / "benchmarks" / "results" / "lab.json"


def results(lab: Lab, runs: Sequence[Run], command: str) -> dict[str, Any]:
    """The results of a family: only arms with a finished run or a failure. Raises ValueError before the first finished run."""
    done = [run for run in runs if run.done]
    if not done:
        raise ValueError(f"No run of the lab for {lab.family} is finished.\nWhat to do: start it again, with more --hours.")
    teacher_TN = verdicts_of(done[0].evaluation, TEACHER)
    made = max((_made(run) for run in done), key=lambda one: one["date"])
    by_arm = {arm.name: [run for run in runs if run.arm == arm.name] for arm in lab.arms}
    rows = [_row(arm, lab.arms[0].tflop, by_arm[arm.name], teacher_TN) for arm in lab.arms if _shown(by_arm[arm.name])]
    asked = [claim for claim in lab.claims if {claim["arm"], claim["against"]} <= by_arm.keys()]
    claims = [_claim(claim, by_arm[claim["arm"]], by_arm[claim["against"]], teacher_TN) for claim in asked]
    return {
        "command": command,
        "made": {key: made[key] for key in ("date", "machine", "versions")},
        "commits": sorted({_made(run)["commit"] for run in done}),
        "teacher": _tasks(teacher_TN[None]),
        "arms": rows,
        "claims": [claim for claim in claims if claim["seeds"]],
    }


def _made(run: Run) -> dict[str, Any]:
    return json.loads((run.evaluation / "results.json").read_text(encoding="utf-8"))["made"]


def _shown(runs: Sequence[Run]) -> bool:
    return any(run.done or run.failure.is_file() for run in runs)


def _verdicts(run: Run) -> Verdicts:
    return verdicts_of(run.evaluation, run.arm)


def _row(arm: Arm, base_tflop: float, runs: Sequence[Run], teacher_TN: Verdicts) -> dict[str, Any]:
    """An arm: its scores are the means over seeds, question by question."""
    done = [run for run in runs if run.done]
    row: dict[str, Any] = {
        "name": arm.name,
        "title": arm.title,
        "stages": arm.steps(),
        "tflop": round(arm.tflop, 2),
        "of_base": round(arm.tflop / base_tflop, 3),
        "captions": arm.captions,
        "failed": [f"seed {run.seed}: {run.failure.read_text(encoding='utf-8')}" for run in runs if run.failure.is_file() and not run.done],
        "seeds": [_seed(run, teacher_TN) for run in done],
    }
    if not done:
        return row
    verdicts_STN = np.stack([_verdicts(run) for run in done])
    return row | {"share": share(verdicts_STN.mean(axis=0), teacher_TN), "tasks": _tasks(verdicts_STN)}


def _seed(run: Run, teacher_TN: Verdicts) -> dict[str, Any]:
    kept = float(_verdicts(run).mean() / teacher_TN.mean())
    return {"seed": run.seed, "share": round(kept, 4), "training_s": training_s(run.folder, "train"), "commit": _made(run)["commit"]}


def _tasks(verdicts_STN: Verdicts) -> dict[str, Any]:
    """Accuracy of each task, the mean over seeds."""
    found = {task: proportion(list(values)) for task, values in zip(TASKS, verdicts_STN.mean(axis=0), strict=True)}
    return {task: {name: part and round(part, 4) for name, part in one.to_json().items()} for task, one in found.items()}


def _claim(claim: Mapping[str, str], arms: Sequence[Run], against: Sequence[Run], teacher_TN: Verdicts) -> dict[str, Any]:
    """The difference of two arms as a share of the teacher, on the same questions and the seeds that both have; of one task if named.

    It is clear if neither its interval over captions nor that over training runs has 0.
    """
    pairs = [(one, other) for one in arms for other in against if one.seed == other.seed and one.done and other.done]
    rows = [number for number, task in enumerate(TASKS) if claim.get("task", task) == task]
    differences = [(_verdicts(one) - _verdicts(other))[rows] for one, other in pairs]
    if not pairs:
        return {**claim, "seeds": []}
    each = [round(float(one.mean() / teacher_TN[rows].mean()), 4) for one in differences]
    difference, runs = share(np.mean(differences, axis=0), teacher_TN[rows]), over_runs(each)
    bounds = (difference["low"], difference["high"], *(runs or (None,)))
    clear = all(bound is not None and bound > 0 for bound in bounds) or all(bound is not None and bound < 0 for bound in bounds)
    return {**claim, "seeds": each, "difference": difference, "over_runs": runs, "clear": clear}


def over_runs(each: Sequence[float]) -> list[float] | None:
    """The 95 % interval of the mean of some runs' differences, by Student's t; None of a single run."""
    if len(each) < 2:
        return None
    from scipy import stats  # it takes two seconds to import

    reach = float(stats.t.ppf(0.975, len(each) - 1)) * float(np.std(each, ddof=1)) / len(each) ** 0.5
    return [round(float(np.mean(each)) - reach, 4), round(float(np.mean(each)) + reach, 4)]
