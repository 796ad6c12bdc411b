"""Measures every encoder of the miniature and writes miniature/results.json; with --baseline, trains the encoder without context.

The numbers are those of the product's own command: `evaluate miniature`, with a process on each processor core.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch

from ..runtime.comfyui import start_comfyui
from ..runtime.disk import replace_file
from ..train.recipe import load_recipe
from .comfyui.children import call
from .docs.miniature_tables import RESULTS, SCALED, blocks, write
from .miniature import (
    CONTEXT_FREE,
    MIDDLE,
    MIDDLE_RUN,
    PAIRS,
    ROOT,
    RUNS,
    WORK,
    Run,
    both,
    in_bfloat16,
    processes,
    same_weights,
    student_file,
)

if TYPE_CHECKING:
    from ..evaluate.confidence import Score
    from ..evaluate.suite import Suite

# An ablation, and a point of the curve, need fewer pictures than a row of the scaling table.
ABLATION_SHARE, CURVE_SHARE = 4, 8
UNTRAINED = "untrained"
# An encoder's file, and facts about it.
Found = tuple[Path, dict[str, Any]]
# Folders of what is painted: for the scaling table and the pairs, the other ablations and the curve.
PARTS = ("evaluation", "ablation", "curve")
RESAMPLES = 2000
KEPT_PROBES = ("collapse", "velocity_gap")


@dataclass(frozen=True)
class Row:
    """What is measured of an encoder: right pictures by task, milliseconds to encode a caption (mean, alone), other numbers; and
    whether each picture is right (1.0 or 0.0), by task."""

    scores: dict[str, Score]
    encode_ms: float | None = None
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    verdicts: dict[str, list[float]] = field(default_factory=dict)


def asked_suite(count: int, *, probes: bool) -> Suite:
    """The shipped suite with `count` prompts for each task; without probes it paints only the tasks that the share of the teacher is of."""
    from ..evaluate.suite import load_suite
    from ..world.pictures import TASKS

    suite = load_suite("miniature")
    tasks = [task for task in suite.tasks if probes or task.name in TASKS]
    limited = [task.model_copy(update={"prompts": task.prompts.model_copy(update={"limit": count})}) for task in tasks]
    left_out = {} if probes else dict.fromkeys(("embedding", "velocity_gap", "latent_distance", "cost"))
    return suite.model_copy(update={"tasks": tuple(limited), **left_out})


def evaluate(comfyui: Path, suite: Suite, students: Sequence[Path], out: Path) -> list[Row]:
    """The rows of the teacher and the students, by the evaluation's command, a process on each processor core; what is painted stays."""
    out.mkdir(parents=True, exist_ok=True)
    asked = out / "asked.toml"
    asked.write_text(suite.to_toml(), encoding="utf-8")
    given = [part for path in students for part in ("--student", path)]
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes()))
    call(*ranks, ROOT / "evaluate" / "__main__.py", asked, *given, "--out", out, "--comfyui", comfyui, "--", "--cpu", OMP_NUM_THREADS="1")
    return rows_of(json.loads((out / "results.json").read_text(encoding="utf-8")), out / "scores")


def rows_of(found: dict[str, Any], kept: Path) -> list[Row]:
    """The rows in an evaluation's results.json, in the order of its encoders; `kept` is the folder of its scores."""
    from ..evaluate.confidence import Score

    rows = []
    for encoder in found["encoders"]:
        of_encoder = {task: told["scores"]["readback"][encoder] for task, told in found["tasks"].items()}
        scores = {task: Score(round(one["value"] * one["n"]), one["n"]) for task, one in of_encoder.items()}
        probes = {
            probe: {name: by_encoder[encoder] for name, by_encoder in numbers.items() if encoder in by_encoder}
            for probe, numbers in found["probes"].items()
        }
        seconds = probes.get("cost", {}).get("encode s")
        verdicts = {task: _verdicts(kept / encoder / f"{task}.readback.json") for task in of_encoder}
        rows.append(Row(scores, None if seconds is None else 1000 * seconds["value"], probes, verdicts))
    return rows


def _verdicts(file: Path) -> list[float]:
    return json.loads(file.read_text(encoding="utf-8"))["found"]["readback"]


def measure_context_free(comfyui: Path, file: Path, count: int) -> Row:
    """The row of the encoder without context, which is no file that ComfyUI loads, so its times are not comparable and not taken."""
    from ..miniature.corruption import load_tokenizer
    from ..miniature.measure import scores
    from ..miniature.paint import Painter
    from .context_free import context_free_encoder

    encode = context_free_encoder(file, load_tokenizer(comfyui))
    return Row(scores(functools.partial(Painter().paint, encode), count))


def share_interval(student: Row, teacher: Row) -> tuple[float, float] | None:
    """The 95 % interval of the share of the teacher's mean accuracy, by resampling the questions of each task, the same for both; None
    where single verdicts are not known or all are alike."""
    drawn = _drawn_again([student, teacher])
    return None if drawn is None or np.ptp(drawn[:, 0]) == 0 else _interval(drawn[:, 0] / drawn[:, 1])


def _drawn_again(rows: Sequence[Row]) -> np.ndarray | None:
    """Mean accuracies [resamples, rows] on questions of each task drawn again, the same for all rows; None without single verdicts."""
    from ..world.pictures import TASKS

    if not all(row.verdicts for row in rows):
        return None
    random, drawn = np.random.default_rng(0), np.zeros((RESAMPLES, len(rows)))
    for one in drawn:
        for task in TASKS:
            verdicts = np.array([row.verdicts[task] for row in rows])
            one += verdicts[:, random.integers(verdicts.shape[1], size=verdicts.shape[1])].mean(axis=1)
    return drawn / len(TASKS)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return round(float(low), 4), round(float(high), 4)


def pair(seed: int, following: Row, naive: Row, teacher: Row, minutes: Sequence[float | None]) -> dict[str, Any]:
    """What following is worth, in shares of the teacher, on the same questions; minutes of training of both."""
    from ..miniature.measure import share_of

    shares = [share_of(row.scores, teacher.scores) for row in (following, naive)]
    drawn = _drawn_again([following, naive, teacher])
    told = {"seed": seed, "following": round(shares[0], 4), "naive": round(shares[1], 4), "difference": round(shares[0] - shares[1], 4)}
    interval = None if drawn is None else _interval((drawn[:, 0] - drawn[:, 1]) / drawn[:, 2])
    return {**told, "interval": interval, "n": next(iter(naive.scores.values())).n, "minutes": list(minutes)}


def training_minutes(work: Path, name: str) -> float | None:
    """Minutes that a student was trained for; None if that was not on this machine."""
    run = work / "runs" / name
    return round(training_s(run) / 60, 1) if (run / "metrics.jsonl").is_file() else None


def entry(name: str, row: Row, teacher: Row | None, **facts: Any) -> dict[str, Any]:
    """What results.json says about one encoder."""
    from ..miniature.measure import mean_accuracy, share_of

    told = {"name": name, **facts, "tasks": {task: one.to_json() for task, one in row.scores.items()}}
    told |= {"mean_accuracy": round(mean_accuracy(row.scores), 4), "encode_ms": row.encode_ms and round(row.encode_ms, 2)}
    told |= {"probes": {name: numbers for name, numbers in row.probes.items() if name in KEPT_PROBES}}
    if teacher is None:
        return told
    share, interval = round(share_of(row.scores, teacher.scores), 4), share_interval(row, teacher)
    return told | {"share_of_teacher": share, "share_interval": interval}


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


def context_free_facts(file: Path) -> dict[str, Any]:
    """Size of the encoder without context; its file is float32, and is told as half as large, as the others are."""
    tensors = safetensors.torch.load_file(file)
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    steps = sum(stage.steps for stage in load_recipe(MIDDLE_RUN.recipe).stages)
    counted = {"parameters": sum(sizes.values()), "parameters_without_tokens": sizes["place"]}
    return {**counted, "bytes": 2 * sum(sizes.values()), "steps": steps}


def objective_of(run: Run) -> str:
    """The objectives of a run's stages: velocity, embedding, or both, one after the other."""
    return ", then ".join(dict.fromkeys(stage.objective for stage in load_recipe(run.recipe, run.settings).stages))


def untrained_file(work: Path) -> Path:
    """The middle student as it is before its first step: what chance gives."""
    from ..encoder.files import write_student
    from ..encoder.metadata import StudentMetadata
    from ..miniature.teacher import LAYOUT
    from ..train.student_start import RANDOM, make_student
    from ..world.captions import TOKEN_LENGTH

    path = student_file(work, UNTRAINED)
    if not path.is_file():
        layout = load_recipe("miniature-quarter").student.student_layout(LAYOUT.d_model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_student(path, make_student(layout, RANDOM, 0.0, seed=0).tensors(), StudentMetadata(token_length=TOKEN_LENGTH, pooled="zero"))
    return path


def measured_file(work: Path, name: str) -> Path | None:
    """The file of a student that is measured, in bfloat16: the pack's, unless this machine trained another of the name; None: neither."""
    from ..runtime.model_folders import SHIPPED

    shipped, made = SHIPPED / "text_encoders" / f"{name}.safetensors", student_file(work, name)
    if made.is_file() and not same_weights(shipped, made):
        return in_bfloat16(name, work)
    return shipped if shipped.is_file() else None


def training_s(run: Path, steps: float = math.inf) -> float:
    """Seconds that a run spent in its first optimizer steps, or in all, without validations, previews and checkpoints."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batch = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))["stage"][0]["batch"]
    return sum(batch / row["samples_per_s"] for row in rows if "loss" in row and row["step"] <= steps)


def curve_files(work: Path) -> list[Path]:
    """The middle student at its checkpoints, at every second one while it imitates; empty if it was not trained on this machine."""
    imitation = load_recipe(MIDDLE_RUN.recipe).stages[0].steps
    found = sorted((work / "runs" / MIDDLE / "checkpoints").glob("step-*/student.safetensors"))
    return [file for file in found if steps_of(file) >= imitation or steps_of(file) % 1000 == 0]


def steps_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint's student has taken."""
    return int(checkpoint.parent.name.removeprefix("step-"))


def point(file: Path, row: Row, teacher: Row) -> dict[str, Any]:
    """What the middle student kept of the teacher at a checkpoint, on the same pictures."""
    from ..miniature.measure import share_of

    steps, run = steps_of(file), file.parents[2]
    share, n = round(share_of(row.scores, teacher.scores), 4), next(iter(row.scores.values())).n
    interval = share_interval(row, teacher)
    return {"steps": steps, "training_s": round(training_s(run, steps), 1), "share_of_teacher": share, "share_interval": interval, "n": n}


def curve_of(comfyui: Path, work: Path, count: int) -> list[dict[str, Any]]:
    """The middle student at its checkpoints; where they are gone, what results.json says, since it cannot be measured again (a trial
    without has no curve)."""
    files = curve_files(work)
    if not files:
        return json.loads(RESULTS.read_text(encoding="utf-8")).get("curve", []) if work == WORK and RESULTS.is_file() else []
    teacher, *students = evaluate(comfyui, asked_suite(count, probes=False), files, work / PARTS[2])
    return [point(file, row, teacher) for file, row in zip(files, students, strict=True)]


def found_encoders(work: Path) -> dict[str, Found]:
    """Name, file and facts of every student that there is, and of the untrained one."""
    runs = {run: path for run in RUNS if (path := measured_file(work, run.name)) is not None}
    found = {run.name: (path, {"objective": objective_of(run), **facts_of(path)}) for run, path in runs.items()}
    untrained_file(work)
    untrained = in_bfloat16(UNTRAINED, work)
    return found | {UNTRAINED: (untrained, {"objective": "none", **facts_of(untrained)})}


def _measured(comfyui: Path, encoders: Mapping[str, Found], count: int, out: Path) -> tuple[dict[str, Row], list[dict[str, Any]]]:
    """The rows of the teacher and of these encoders, and what results.json says about them, on the same `count` pictures of each task."""
    teacher, *rows = evaluate(comfyui, asked_suite(count, probes=True), [path for path, _ in encoders.values()], out)
    told = [entry(name, row, teacher, **facts) for (name, (_, facts)), row in zip(encoders.items(), rows, strict=True)]
    return {"teacher": teacher, **dict(zip(encoders, rows, strict=True))}, told


def results(comfyui: Path, work: Path, count: int) -> dict[str, Any]:
    """Measure the teacher and every student, baseline and point of the curve that there is."""
    from ..benchmarks.support.measuring import machine
    from ..miniature.files import TEACHER_FILE, place
    from ..runtime.model_folders import SHIPPED

    done = work / "measured"
    if done.is_file():  # by a command that came to its end: everything is measured anew
        for folder in PARTS:
            shutil.rmtree(work / folder, ignore_errors=True)
        done.unlink()
    where, encoders, fewer = machine(comfyui, gpu=False, note=""), found_encoders(work), max(count // ABLATION_SHARE, 1)
    whole = (*SCALED, *(name for names in PAIRS.values() for name in names))
    rows, students = _measured(comfyui, {name: found for name, found in encoders.items() if name in whole}, count, work / PARTS[0])
    others = {name: found for name, found in encoders.items() if name not in whole}
    rows_on_fewer, ablations = _measured(comfyui, others, fewer, work / PARTS[1])
    baseline = work / f"{CONTEXT_FREE}.safetensors"
    if baseline.is_file():
        facts = {"objective": objective_of(MIDDLE_RUN), **context_free_facts(baseline)}
        ablations.append(entry(CONTEXT_FREE, measure_context_free(comfyui, baseline, fewer), rows_on_fewer["teacher"], **facts))
    told = entry("teacher", rows["teacher"], None, **facts_of(place(SHIPPED, TEACHER_FILE)))
    pairs = [
        pair(seed, rows[following], rows[naive], rows["teacher"], [training_minutes(work, name) for name in (following, naive)])
        for seed, (following, naive) in PAIRS.items()
        if rows.keys() >= {following, naive}
    ]
    return {
        "commit": where["commit"],
        "hardware": where,
        "count": count,
        "teacher": told["tasks"],
        "teacher_facts": told,
        "students": [*students, *ablations],
        "pairs": pairs,
        "curve": curve_of(comfyui, work, max(count // CURVE_SHARE, 1)),
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
        from .context_free import train_context_free

        settings = () if options.steps is None else both(f"steps={options.steps}")
        train_context_free(load_recipe("miniature-quarter", settings), options.baseline)
        return
    found = results(options.comfyui, options.work, options.count)
    replace_file(options.out, (json.dumps(found, indent=2) + "\n").encode())
    (options.work / "measured").touch()
    if options.out == RESULTS:
        write(found)
    for text in blocks(found).values():
        print(f"\n{text}")


if __name__ == "__main__":
    main()
