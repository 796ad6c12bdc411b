"""Measures every encoder of the miniature and writes miniature/results.json; with --baseline, trains the encoder without context.

Each encoder is measured by a process of its own on one thread, as many at a time as there are processor cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..train.host import start_comfyui
from .miniature import CONTEXT_FREE, MIDDLE, RUNS, WORK, Run, call, student_file
from .miniature_tables import RESULTS, blocks, write

ENCODES = 50
# A point of the curve needs fewer pictures than a row of the table.
CURVE_SHARE = 8
UNTRAINED = "untrained"


def measure(comfyui: Path, encoder: Path, count: int, tasks: Sequence[str]) -> dict[str, Any]:
    """Right pictures by task, and the median time to encode a caption, alone; of an encoder's file."""
    from ..miniature.corruption import load_tokenizer
    from ..miniature.measure import questions, scores
    from ..miniature.paint import Painter, served
    from .context_free import context_free_encoder

    encode = context_free_encoder(encoder, load_tokenizer(comfyui)) if encoder.stem == CONTEXT_FREE else served(encoder)
    found = scores(functools.partial(Painter().paint, encode), count, tasks)
    seconds = []
    for _, caption in questions("position", ENCODES):
        started = time.perf_counter()
        encode([caption])
        seconds.append(time.perf_counter() - started)
    return {"right": {task: one.right for task, one in found.items()}, "n": count, "encode_ms": 1000 * statistics.median(seconds)}


def measured(comfyui: Path, encoder: Path, count: int, tasks: Sequence[str]) -> dict[str, Any]:
    """What `measure` finds, in a process of its own: scores by task, encode_ms."""
    from ..evaluate.confidence import Score

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "one.json"
        asked = ["--encoder", encoder, "--count", str(count), "--tasks", *tasks, "--out", out]
        call("-m", "distilled_t5.devtools.miniature_results", "--comfyui", comfyui, *asked, OMP_NUM_THREADS="1")
        found = json.loads(out.read_text(encoding="utf-8"))
    return {"scores": {task: Score(right, found["n"]) for task, right in found["right"].items()}, "encode_ms": found["encode_ms"]}


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


def curve_files(work: Path) -> list[Path]:
    """The middle student at each of its checkpoints; empty if it was not trained on this machine."""
    return sorted((work / "runs" / MIDDLE / "checkpoints").glob("step-*/student.safetensors"))


def point(file: Path, row: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """What the middle student kept of the teacher at a checkpoint."""
    from ..miniature.measure import share_of

    steps, run = int(file.parent.name.removeprefix("step-")), file.parents[2]
    share, n = round(share_of(row["scores"], teacher["scores"]), 4), next(iter(row["scores"].values())).n
    return {"steps": steps, "training_s": round(training_s(run, steps), 1), "share_of_teacher": share, "n": n}


def kept_curve() -> list[dict[str, Any]]:
    """The curve in results.json: where the run's checkpoints are gone, it cannot be measured again."""
    return json.loads(RESULTS.read_text(encoding="utf-8")).get("curve", []) if RESULTS.is_file() else []


def found_encoders(work: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name, file and facts of the teacher, of every student that there is, of the untrained one and of the encoder without context."""
    from ..miniature.folders import SHIPPED, TEACHER_FILE, place

    runs = {run: path for run in RUNS if (path := shipped_or_made(work, run.name)) is not None}
    untrained, baseline, teacher = untrained_file(work), work / f"{CONTEXT_FREE}.safetensors", place(SHIPPED, TEACHER_FILE)
    found = {"teacher": (teacher, facts_of(teacher))}
    found |= {run.name: (path, {"objective": objective_of(run), **facts_of(path)}) for run, path in runs.items()}
    found |= {UNTRAINED: (untrained, {"objective": "none", **facts_of(untrained)})}
    if baseline.is_file():
        found[CONTEXT_FREE] = (baseline, {"objective": objective_of(Run(MIDDLE, "miniature-quarter")), "bytes": baseline.stat().st_size})
    return found


def results(comfyui: Path, work: Path, count: int) -> dict[str, Any]:
    """Measure the teacher and every student, baseline and point of the curve that there is."""
    from ..miniature.measure import MEASURED
    from ..miniature.world import TASKS
    from .measure import machine

    encoders, files, few = found_encoders(work), curve_files(work), max(count // CURVE_SHARE, 1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = {name: pool.submit(measured, comfyui, path, count, MEASURED) for name, (path, _) in encoders.items()}
        points = {file: pool.submit(measured, comfyui, file, few, TASKS) for file in files}
        teacher = rows.pop("teacher").result()
        students = [entry(name, row.result(), teacher, **encoders[name][1]) for name, row in rows.items()]
        curve = [point(file, row.result(), teacher) for file, row in points.items()]
    where = machine(comfyui, gpu=False, note="")
    told = entry("teacher", teacher, None, **encoders["teacher"][1])
    return {
        "commit": where["commit"],
        "hardware": where,
        "count": count,
        "teacher": told["tasks"],
        "teacher_facts": told,
        "students": students,
        "curve": curve or kept_curve(),
    }


def main() -> None:
    """Read the command line; train the baseline, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--baseline", type=Path, help="train the encoder without context into this file")
    parser.add_argument("--encoder", type=Path, help="measure this file alone")
    parser.add_argument("--tasks", nargs="*", help="with --encoder: these tasks")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON (default: miniature/results.json)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start_comfyui(options.comfyui.resolve(), [])
    if options.encoder:
        found = measure(options.comfyui, options.encoder, options.count, options.tasks)
        options.out.write_text(json.dumps(found), encoding="utf-8")
        return
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
