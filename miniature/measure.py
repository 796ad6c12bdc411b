"""How often pictures show what was asked for: by task, on combinations that training never showed, with the reader as the only judge."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..evaluate.confidence import Score
from ..world.pictures import TASKS
from ..world.questions import questions
from ..world.reader import verdict
from ..world.scenes import NEW_IN_TASK, Split

# The seed of the questions: no training draws from it.
QUESTIONS_SEED = 1_000_003
MEASURED = tuple(NEW_IN_TASK)
Paint = Callable[[Sequence[str], Sequence[int]], np.ndarray]
log = logging.getLogger(__name__)


def score(paint: Paint, task: str, count: int, split: Split = "held_out") -> Score:
    """How many of a task's pictures, painted from seeds 0, 1, 2 ..., show what their captions say."""
    asked = questions(task, count, split)
    pictures = paint([caption for _, caption in asked], range(count))
    right = sum(verdict(scene, picture) for (scene, _), picture in zip(asked, pictures, strict=True))
    log.info("%s: %d of %d right", task, right, count)
    return Score(right, count)


def scores(paint: Paint, count: int, tasks: Sequence[str] = MEASURED, split: Split = "held_out") -> dict[str, Score]:
    """The score of every task."""
    return {task: score(paint, task, count, split) for task in tasks}


def mean_accuracy(found: Mapping[str, Score]) -> float:
    """The mean over the tasks for which the teacher has a floor: all but new words."""
    return sum(found[task].accuracy for task in TASKS) / len(TASKS)


def share_of(student: Mapping[str, Score], teacher: Mapping[str, Score]) -> float:
    """What the student keeps of the teacher's mean accuracy. Raises ValueError if the teacher gets nothing right."""
    whole = mean_accuracy(teacher)
    if not whole:
        raise ValueError(
            "The teacher got no picture right, so there is no share of it.\nWhat to do: see that Flux and teacher belong together."
        )
    return mean_accuracy(student) / whole


def table(rows: Mapping[str, Mapping[str, Score]]) -> str:
    """Accuracies in percent as a Markdown table, a row per encoder."""
    columns = [task for task in MEASURED if any(task in found for found in rows.values())]
    lines = ["| Encoder | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, found in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{100 * found[task].accuracy:.1f}" if task in found else "" for task in columns) + " |")
    return "\n".join(lines)


def measure_files(folder: Path, files: Sequence[Path], count: int) -> dict[str, dict[str, Score]]:
    """The scores of encoder files with the Flux and the VAE that lie in `folder`, by path. ComfyUI must be importable."""
    from .paint import Painter, served

    painter, found = Painter(folder), {}
    for path in files:
        log.info("%s:", path.name)
        found[str(path)] = scores(functools.partial(painter.paint, served(path)), count)
    return found
