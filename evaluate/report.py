"""What an evaluation leaves in its folder: results.json, table.md, summary.txt, plots/, page.html."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.disk import replace_file
from . import provenance
from .context import Evaluation
from .embeddings import joint_tsne, map_figure
from .judge_images import Verdicts
from .page import SMALL_PX, chosen_questions, data_uri, page, row
from .plots import plot_file, write_plots
from .probe_encoders import Measurements
from .questions import Question
from .results import Report, losses, markdown, measured_scores, picture_losses, shares, summary, to_json

FORMAT = 1


def write_all(work: Evaluation, verdicts: Verdicts, measured: Measurements, seconds: float) -> Path:
    """Write everything; returns the page's file."""
    teacher, names, scores = work.teacher.name, [encoder.name for encoder in work.encoders], verdicts.images
    tasks = {task: {**numbers, **verdicts.sets.get(task, {})} for task, numbers in measured_scores(scores).items()}
    report = Report(work.suite.name, names, tasks, losses(scores, teacher), measured.numbers, shares(scores, teacher, names[1:]))
    origin = _origin(work, seconds)
    replace_file(work.out / "results.json", json.dumps(_results(work, report, origin), indent=1, allow_nan=False).encode())
    replace_file(work.out / "table.md", (markdown(report) + "\n" + _sentence(origin) + "\n").encode())
    replace_file(work.out / "summary.txt", (summary(report) + "\n").encode())
    maps = _maps(work, measured)
    write_plots(work.out / "plots", report, maps)
    lost = picture_losses(scores, teacher, names[1:])
    chosen = chosen_questions(work.questions, lost, work.suite.page.prompts)
    by_name = {encoder.name: encoder for encoder in work.encoders}

    def file_of(encoder: str, question: Question) -> Path:
        return work.images(by_name[encoder], question.task).file(question.index)

    rows = [row(question, scores, lost, names, file_of, work.suite.page.side_px) for question in chosen]
    asked = sum(map(len, work.questions.values()))
    small = work.suite.sampling.resolution_px <= SMALL_PX
    notes = {"provenance": _sentence(origin), "chosen": _chosen(len(rows), asked), "small": small}
    map_images = {name: data_uri(plot_file(figure, "png"), "png") for name, figure in maps.items()}
    replace_file(work.out / "page.html", page(report, rows, map_images, notes).encode())
    return work.out / "page.html"


def _results(work: Evaluation, report: Report, origin: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "suite": {"name": work.suite.name, "sha256": work.suite.sha256},
        "made": origin,
        "generated_by": work.generated_by,
        "encoders": {
            encoder.name: {
                "file": encoder.path.name,
                "role": "teacher" if encoder is work.teacher else "student",
                "bytes": encoder.path.stat().st_size,
                "clip_l": None,
                **{name: path.name for name, path in encoder.companions.items()},
                "fingerprint": encoder.made_of()["encoder"],
            }
            for encoder in work.encoders
        },
        "tasks": {
            task: {"prompts": len(asked), "scores": to_json(report.tasks[task]), "lost": to_json(report.losses[task])}
            for task, asked in work.questions.items()
        },
        "probes": to_json(report.probes),
        "shares": to_json(report.shares),
    }


def _origin(work: Evaluation, seconds: float) -> dict[str, Any]:
    """When, where and with which software the numbers were measured."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "processes": work.processes.ranks.world,
        "commit": provenance.commit_of(),
        "sources_sha256": provenance.sources_sha256(),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def _sentence(origin: Mapping[str, Any]) -> str:
    """The origin of the numbers as a sentence."""
    machine, versions = origin["machine"], origin["versions"]
    commit = origin["commit"][:12] if origin["commit"] else "not in a repository"
    where = f"on {machine['gpu']}" if machine["gpu"] else "without a GPU"
    return (
        f"Measured {origin['date'][:10]} {where}, on {machine['cpu']} ({machine['cores']} cores), ComfyUI "
        f"{versions['comfyui']}, torch {versions['torch']}, commit {commit}, sources {origin['sources_sha256'][:12]}."
    )


def _chosen(shown: int, asked: int) -> str:
    if shown == asked:
        return f"All {asked:,} prompts."
    return f"{shown:,} of {asked:,} prompts: half of each task are those on which a student loses most, the others are the first ones."


def _maps(work: Evaluation, measured: Measurements) -> dict[str, Any]:
    """The figure of the t-SNE map of each student's embeddings together with the teacher's."""
    maps, teacher = {}, work.teacher.name
    for student in work.students if work.suite.draws_maps else ():
        points = joint_tsne({name: measured.vectors[name] for name in (teacher, student.name)}, seed=work.suite.seed)
        maps[f"{teacher} and {student.name}"] = map_figure(points, "Pooled embeddings of the same prompts")
    return maps
