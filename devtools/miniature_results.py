"""miniature/results.json from an evaluation: each encoder's numbers and share of the teacher, pairs of students, the cost curve."""

# T tasks, N questions

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..evaluate.measured import share as measured_share
from ..runtime.model_folders import SHIPPED
from ..world.pictures import TASKS
from .commands import ROOT

RESULTS = ROOT / "miniature" / "results.json"
SIZES = ("half", "quarter", "tenth", "fortieth")
TEACHER, MIDDLE, UNTRAINED = "miniature_teacher", "miniature_student_quarter", "untrained"
SD3_STUDENT = "miniature_sd3_student_quarter"
# By seed, the student that follows and the one that imitates for as many steps.
PAIRS = {0: (MIDDLE, "quarter_naive"), 1: ("quarter_seed_1", "quarter_naive_seed_1")}
PROBES = ("collapse", "velocity_gap")
# Whether each image is right (1) or not (0), [T, N].
Verdicts = np.ndarray


def results(work: Path, command: str, files: Mapping[str, Path], objectives: Mapping[str, str]) -> dict[str, Any]:
    """The content of results.json. `files` and `objectives` by student; checkpoints of MIDDLE become points of the curve."""
    evaluation = work / "evaluation"
    verdicts = {name: verdicts_of(evaluation, name) for name in (TEACHER, *files)}
    steps = {name: step for name in files if (step := checkpoint_step(name))}
    found = measured(evaluation, command, {name: file for name, file in files.items() if name not in steps}, objectives)
    curve = [
        {"steps": step, "training_s": training_s(work, MIDDLE, step), "share": share(verdicts[name], verdicts[TEACHER])}
        for name, step in steps.items()
    ]
    pairs = [pair(seed, *names, verdicts, work) for seed, names in PAIRS.items() if verdicts.keys() >= {*names}]
    return {**found, "pairs": pairs, "curve": curve or kept("curve")}


def measured(evaluation: Path, command: str, files: Mapping[str, Path], objectives: Mapping[str, str]) -> dict[str, Any]:
    """Command, machine, and the numbers of the teacher and of the students in `files` from an evaluation's folder."""
    found = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
    verdicts = {name: verdicts_of(evaluation, name) for name in (TEACHER, *files)}
    if not verdicts[TEACHER].any():
        raise ValueError("The teacher got no image right.\nWhat to do: check that diffusion model and teacher were trained together.")
    files = {TEACHER: SHIPPED / "text_encoders" / f"{TEACHER}.safetensors", **files}
    encoders = [numbers(found, name) | facts(file) for name, file in files.items()]
    for one in encoders[1:]:
        one |= {"objective": objectives.get(one["name"], "none"), "share": share(verdicts[one["name"]], verdicts[TEACHER])}
    return {"command": command, "made": found["made"], "encoders": encoders}


def checkpoint_step(name: str) -> int:
    """The optimizer step of a checkpoint's name; 0 for other names."""
    return int(name.rpartition("step-")[2]) if "step-" in name else 0


def kept(part: str) -> Any:
    """A part of the current results.json, for a machine without what it was measured on."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))[part] if RESULTS.is_file() else []


def verdicts_of(evaluation: Path, name: str) -> Verdicts:
    """The verdicts of an encoder's images in an evaluation's folder."""
    kept = [json.loads((evaluation / "scores" / name / f"{task}.readback.json").read_text(encoding="utf-8")) for task in TASKS]
    return np.array([one["found"]["readback"] for one in kept])


def numbers(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An encoder's numbers in an evaluation's results."""
    seconds = found["probes"]["cost"]["encode s"][name]["value"]
    return {
        "name": name,
        "tasks": {task: one["scores"]["readback"][name] for task, one in found["tasks"].items()},
        "encode_ms": round(1000 * seconds, 2),
        "probes": {
            probe: {number: by_encoder[name] for number, by_encoder in found["probes"][probe].items() if name in by_encoder}
            for probe in PROBES
        },
    }


def facts(path: Path) -> dict[str, Any]:
    """Parameters with and without the token table, bytes, and optimizer steps of an encoder file."""
    from dataclasses import replace

    from ..encoder.files import open_student
    from ..students.t5.layout import StudentLayout

    file = open_student(path)
    return {
        "parameters": file.layout.parameters,
        "parameters_without_tokens": replace(cast(StudentLayout, file.layout), vocab_size=0).parameters,
        "bytes": path.stat().st_size,
        "steps": int(file.metadata.facts.get("distilled_t5.steps", 0)),
    }


def share(student_TN: Verdicts, teacher_TN: Verdicts) -> dict[str, Any]:
    """The student's mean accuracy over tasks as a share of the teacher's, as the evaluation measures it; n: images of each task."""
    found = measured_share(student_TN.tolist(), teacher_TN.tolist()).to_json() | {"n": student_TN.shape[1]}
    return {name: part if part is None or name == "n" else round(part, 4) for name, part in found.items() if name != "identical"}


def pair(seed: int, following: str, naive: str, verdicts: Mapping[str, Verdicts], work: Path) -> dict[str, Any]:
    """Shares of the teacher of two students, and their difference on the same questions; minutes of training of both."""
    one_TN, other_TN, teacher_TN = verdicts[following], verdicts[naive], verdicts[TEACHER]
    one, other = (round(part.mean() / teacher_TN.mean(), 4) for part in (one_TN, other_TN))
    minutes = [seconds and round(seconds / 60, 1) for seconds in (training_s(work, following), training_s(work, naive))]
    return {"seed": seed, "following": one, "naive": other, "difference": share(one_TN - other_TN, teacher_TN), "minutes": minutes}


def training_s(work: Path, name: str, steps: float = math.inf) -> float | None:
    """Seconds of a student's first optimizer steps, without validations, previews and checkpoints; None if it was not trained in `work`."""
    run = work / "runs" / name
    if not (run / "metrics.jsonl").is_file():
        return None
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))["stage"][0]["batch"]
    return round(sum(batch / row["samples_per_s"] for row in rows if "loss" in row and row["step"] <= steps), 1)
