"""Measures every encoder of the miniature and writes miniature/results.json; with --baseline, trains the encoder without context."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.host import start_comfyui
from .miniature import CONTEXT_FREE, ROOT, RUNS, SIZES, WORK, Run, student_file

RESULTS = ROOT / "miniature" / "results.json"
ENCODES = 50
UNTRAINED = "untrained"


def measured(painter: Any, encode: Any, count: int) -> dict[str, Any]:
    """Scores by task, and the median time to encode a caption, alone."""
    from ..miniature.measure import questions, scores

    found = scores(functools.partial(painter.paint, encode), count)
    seconds = []
    for _, caption in questions("position", ENCODES):
        started = time.perf_counter()
        encode([caption])
        seconds.append(time.perf_counter() - started)
    return {"scores": found, "encode_ms": 1000 * statistics.median(seconds)}


def entry(name: str, row: dict[str, Any], teacher: dict[str, Any] | None, **facts: Any) -> dict[str, Any]:
    """What results.json says about one encoder."""
    from ..miniature.measure import mean_accuracy, share_of

    found = row["scores"]
    told = {"name": name, **facts, "tasks": {task: one.to_json() for task, one in found.items()}}
    told |= {"mean_accuracy": round(mean_accuracy(found), 4), "encode_ms": round(row["encode_ms"], 2)}
    return told if teacher is None else told | {"share_of_teacher": round(share_of(found, teacher["scores"]), 4)}


def facts_of(path: Path) -> dict[str, Any]:
    """Size of an encoder file: parameters outside the token table and in all, bytes, steps taken."""
    from dataclasses import replace

    from ..encoder.files import open_student

    file = open_student(path)
    return {
        "parameters": file.layout.parameters,
        "parameters_without_tokens": replace(file.layout, vocab_size=0).parameters,
        "bytes": path.stat().st_size,
        "steps": int(file.metadata.facts.get("distilled_t5.steps", 0)),
    }


def objective_of(run: Run) -> str:
    """velocity or embedding."""
    return "embedding" if any(setting.endswith("objective=embedding") for setting in run.settings) else "velocity"


def untrained_file(work: Path) -> Path:
    """The middle student as it is before its first step: what chance gives."""
    from ..encoder.files import write_student
    from ..encoder.metadata import StudentMetadata
    from ..miniature.captions import TOKEN_LENGTH
    from ..miniature.teacher import LAYOUT
    from ..train.recipe import load_recipe
    from ..train.student_start import RANDOM, make_student

    path = student_file(work, UNTRAINED)
    if not path.is_file():
        layout = load_recipe("miniature-quarter").student.student_layout(LAYOUT.d_model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_student(path, make_student(layout, RANDOM, 0.0, seed=0).tensors(), StudentMetadata(token_length=TOKEN_LENGTH, pooled="zero"))
    return path


def shipped_or_made(work: Path, name: str) -> Path | None:
    """The student of that name that this machine trained, else the one that the pack ships, else None."""
    from ..miniature.folders import SHIPPED

    places = (student_file(work, name), SHIPPED / "text_encoders" / f"{name}.safetensors")
    return next((path for path in places if path.is_file()), None)


def results(comfyui: Path, work: Path, count: int) -> dict[str, Any]:
    """Measure the teacher and every student and baseline that there is."""
    from ..miniature.corruption import load_tokenizer
    from ..miniature.folders import SHIPPED, TEACHER_FILE, place
    from ..miniature.paint import Painter, served
    from .context_free import context_free_encoder
    from .measure import machine

    painter, teacher_path = Painter(), place(SHIPPED, TEACHER_FILE)
    teacher = measured(painter, served(teacher_path), count)
    students = []
    for run in RUNS:
        path = shipped_or_made(work, run.name)
        if path is not None:
            row = measured(painter, served(path), count)
            students.append(entry(run.name, row, teacher, objective=objective_of(run), **facts_of(path)))
            print(students[-1]["name"], students[-1]["share_of_teacher"], flush=True)
    row = measured(painter, served(untrained_file(work)), count)
    students.append(entry(UNTRAINED, row, teacher, objective="none", **facts_of(untrained_file(work))))
    baseline = work / f"{CONTEXT_FREE}.safetensors"
    if baseline.is_file():
        row = measured(painter, context_free_encoder(baseline, load_tokenizer(comfyui)), count)
        students.append(entry(CONTEXT_FREE, row, teacher, objective="velocity", bytes=baseline.stat().st_size))
    where = machine(comfyui, gpu=False, note="")
    told = entry("teacher", teacher, None, **facts_of(teacher_path))
    return {
        "commit": where["commit"],
        "hardware": where,
        "count": count,
        "teacher": told["tasks"],
        "teacher_facts": told,
        "students": students,
    }


def percent(tasks: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Accuracies with the reach of their 95 % intervals."""
    return [f"{100 * tasks[name]['accuracy']:.1f} ({100 * tasks[name]['low']:.0f}-{100 * tasks[name]['high']:.0f})" for name in columns]


def tables(found: dict[str, Any]) -> str:
    """The scaling-down table, and that of ablations and baselines, as Markdown."""
    from .measure import table

    columns = list(found["teacher"])
    head = ["encoder", "weights without tokens", "MB", "encode, ms", *(name.replace("_", " ") for name in columns), "share of teacher"]
    scaled = [f"miniature_student_{size}" for size in SIZES]
    by_name = {"teacher": found["teacher_facts"], **{student["name"]: student for student in found["students"]}}
    parts = []
    for names in (
        ["teacher", *(name for name in scaled if name in by_name)],
        [name for name in by_name if name not in ("teacher", *scaled)],
    ):
        rows = [_row(by_name[name], columns) for name in names]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _row(student: dict[str, Any], columns: Sequence[str]) -> list[Any]:
    weights = student.get("parameters_without_tokens")
    share = f"{100 * student['share_of_teacher']:.1f} %" if "share_of_teacher" in student else ""
    size = f"{student['bytes'] / 1e6:.1f}"
    return [student["name"], f"{weights:,}" if weights else "-", size, student["encode_ms"], *percent(student["tasks"], columns), share]


def main() -> None:
    """Read the command line; train the baseline, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--baseline", type=Path, help="train the encoder without context into this file")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON (default: miniature/results.json)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start_comfyui(options.comfyui.resolve(), [])
    if options.baseline:
        from ..train.recipe import load_recipe
        from .context_free import train_context_free

        settings = [] if options.steps is None else [f"stage.0.steps={options.steps}"]
        train_context_free(load_recipe("miniature-quarter", settings), options.baseline)
        return
    found = results(options.comfyui, options.work, options.count)
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(tables(found))


if __name__ == "__main__":
    main()
