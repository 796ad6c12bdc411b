"""Measures every encoder of the miniature and writes miniature/results.json; with --baseline, trains the encoder without context."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import time
import tomllib
from pathlib import Path
from typing import Any

from ..train.host import start_comfyui
from .miniature import CONTEXT_FREE, MIDDLE, RUNS, WORK, Run, student_file
from .miniature_tables import RESULTS, blocks, write

ENCODES = 50
# A point of the curve needs fewer pictures than a row of the table.
CURVE_SHARE = 4
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
    """The objectives of a run's stages: velocity, embedding, or both, one after the other."""
    from ..train.recipe import load_recipe

    return ", then ".join(dict.fromkeys(stage.objective for stage in load_recipe(run.recipe, run.settings).stages))


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
    """The student of that name that the pack ships, else the one that this machine trained, else None."""
    from ..miniature.folders import SHIPPED

    places = (SHIPPED / "text_encoders" / f"{name}.safetensors", student_file(work, name))
    return next((path for path in places if path.is_file()), None)


def training_s(run: Path, steps: int) -> float:
    """Seconds that a run spent in its first optimizer steps, without validations, previews and checkpoints."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))["stage"][0]["batch"]
    return sum(batch / row["samples_per_s"] for row in rows if "loss" in row and row["step"] <= steps)


def curve(painter: Any, work: Path, teacher: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What the middle student kept of the teacher at each of its checkpoints; empty if it was not trained on this machine."""
    from ..miniature.measure import scores, share_of
    from ..miniature.paint import served
    from ..miniature.world import TASKS

    points, run = [], work / "runs" / MIDDLE
    for folder in sorted((run / "checkpoints").glob("step-*")):
        steps = int(folder.name.removeprefix("step-"))
        found = scores(functools.partial(painter.paint, served(folder / "student.safetensors")), count, TASKS)
        share = round(share_of(found, teacher["scores"]), 4)
        points.append({"steps": steps, "training_s": round(training_s(run, steps), 1), "share_of_teacher": share, "n": count})
    return points


def kept_curve() -> list[dict[str, Any]]:
    """The curve in results.json: where the run's checkpoints are gone, it cannot be measured again."""
    return json.loads(RESULTS.read_text(encoding="utf-8")).get("curve", []) if RESULTS.is_file() else []


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
        "curve": curve(painter, work, teacher, max(count // CURVE_SHARE, 1)) or kept_curve(),
    }


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
    if options.out == RESULTS:
        write(found)
    for text in blocks(found).values():
        print(f"\n{text}")


if __name__ == "__main__":
    main()
