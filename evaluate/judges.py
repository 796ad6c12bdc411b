"""The judges of a suite: made, checked before anything is generated, and what decides their scores."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.optional import needed
from .metrics import METRICS, PROBES, Metric
from .provenance import fingerprint
from .questions import Question
from .suite import Suite, Task


def check_judges(suite: Suite) -> None:
    """Make every judge once and drop it, so that everything missing is reported before any image is generated. Raises ValueError."""
    tries = [functools.partial(make_judge, METRICS[name], task, suite, "cpu") for task in suite.tasks for name in task.metrics]
    if suite.draws_maps:
        for module, package in (("sklearn.manifold", "scikit-learn"), ("matplotlib.figure", "matplotlib")):
            tries.append(functools.partial(needed, module, package, "The map of the embeddings"))
    problems = dict.fromkeys(problem for one in tries if (problem := _problem(one)))
    if problems:
        raise ValueError("\n\n".join(problems))


def check_counts(suite: Suite, questions: Mapping[str, Sequence[Question]]) -> None:
    """Raise ValueError that lists the metrics and probes that have fewer prompts than they need."""
    counts = [(METRICS[name], f" of task {task.name}", len(questions[task.name])) for task in suite.tasks for name in task.metrics]
    counts += [(probe, "", sum(map(len, questions.values()))) for probe in PROBES.values() if suite.table_of(probe) is not None]
    problems = [
        f"{record.name}{of}: expected at least {record.least} prompts, got {count}." for record, of, count in counts if count < record.least
    ]
    if problems:
        raise ValueError("\n".join([*problems, "What to do: raise --limit or the limit of the prompts, or name a file with more of them."]))


def _problem(make: Callable[[], Any]) -> str | None:
    try:
        make()
    except ValueError as error:
        return str(error)
    return None


def make_judge(metric: Metric, task: Task, suite: Suite, device: str) -> Any:
    """A metric's judge for a task, or its network of features. Raises ValueError with advice if weights or a package are missing."""
    table = suite.table_of(metric)
    if metric.judge is not None:
        return metric.judge(table, task.prompts.category, device)
    assert metric.features is not None, "a metric has a judge or a network of features"
    return metric.features(table, device)


def judged_by(metric: Metric, suite: Suite, questions: Sequence[Question]) -> dict[str, Any]:
    """What decides a metric's scores besides the images: the suite's table, its weights, what the questions compare with."""
    table = suite.table_of(metric)
    settings = {} if table is None else table.model_dump()
    weights = {name: _weights_of(str(settings[name])) for name in metric.weights if settings.get(name)}
    asked = [[question.target, _photograph_of(question) if metric.features else None] for question in questions]
    compared = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return {"metric": metric.name, "part": settings or None, "weights": weights, "compared with": compared}


@functools.cache
def _weights_of(path: str) -> list[list[str]]:
    """Names and fingerprints of a judge's files; empty where there are none."""
    place = Path(path).expanduser()
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place] if place.is_file() else []
    return [[file.name, fingerprint(file)] for file in files]


def _photograph_of(question: Question) -> list[Any] | None:
    if question.photograph is None:
        return None
    stat = question.photograph.stat()
    return [question.photograph.name, _fingerprint_of(question.photograph, stat.st_size, stat.st_mtime_ns)]


@functools.cache
def _fingerprint_of(photograph: Path, _size: int, _changed_ns: int) -> str:
    return fingerprint(photograph)


def by_number(values: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Scores of images by the name of the number."""
    return {name: [one[name] for one in values] for name in (values[0] if values else {})}
