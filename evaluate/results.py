"""What an evaluation leaves: results.json, and the same numbers as Markdown tables, the first in the form of the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .measured import Measured, mean, mean_difference
from .metrics import PROBES, number_of

# Values of images by task, number and encoder, in the order of the task's questions.
Scores = dict[str, dict[str, dict[str, list[float]]]]
# Measured numbers by group (a task or a probe), name and encoder.
Numbers = dict[str, dict[str, dict[str, Measured]]]
MOST_COLUMNS = 6
INTERVALS = (
    "95 % intervals: Wilson's for shares of right images, the bootstrap's for means (Student's of fewer than ten), "
    "the jackknife's for collapse."
)


def measured_scores(scores: Scores) -> Numbers:
    """The mean of every number over its images, by task, number and encoder."""
    return {
        task: {number: {encoder: mean(values) for encoder, values in by_encoder.items()} for number, by_encoder in numbers.items()}
        for task, numbers in scores.items()
    }


def losses(scores: Scores, teacher: str) -> Numbers:
    """By how much each student is worse than the teacher on the same prompts and seeds: the mean of the images' differences."""
    return {
        task: {
            number: {
                encoder: mean_difference(_image_losses(number, by_encoder[teacher], values))
                for encoder, values in by_encoder.items()
                if encoder != teacher
            }
            for number, by_encoder in numbers.items()
            if teacher in by_encoder
        }
        for task, numbers in scores.items()
    }


def _image_losses(number: str, teacher: Sequence[float], student: Sequence[float]) -> list[float]:
    return [number_of(number).loss(one, other) for one, other in zip(teacher, student, strict=True)]


def picture_losses(scores: Scores, teacher: str, students: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """How much worse each student's image is than the teacher's, by task and student, in the order of the questions.

    An image's loss is the mean over the task's numbers, each as a share of its range. Tasks without a score of each image are left out.
    """
    return {
        task: {student: _mean_losses(numbers, teacher, student) for student in students}
        for task, numbers in scores.items()
        if numbers and students
    }


def _mean_losses(numbers: Mapping[str, Mapping[str, Sequence[float]]], teacher: str, student: str) -> list[float]:
    each = []
    for number, by_encoder in numbers.items():
        values = by_encoder[student]
        # A distance from the teacher is a loss itself.
        lost = _image_losses(number, by_encoder.get(teacher, [0.0] * len(values)), values)
        each.append([loss / number_of(number).span for loss in lost])
    return [statistics.fmean(of_image) for of_image in zip(*each, strict=True)]


def to_json(numbers: Any) -> Any:
    """Nested numbers as JSON."""
    if isinstance(numbers, Measured):
        return numbers.to_json()
    return {name: to_json(part) for name, part in numbers.items()} if isinstance(numbers, Mapping) else numbers


@dataclass(frozen=True)
class Report:
    """All that tables and the page show: encoders in order, the teacher first; numbers and losses by task; probes by name."""

    suite: str
    encoders: list[str]
    tasks: Numbers
    losses: Numbers
    probes: Numbers


@dataclass(frozen=True)
class Cell:
    """A number as it is written, and its interval and count."""

    value: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Table:
    """A row per encoder, a column per number."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def _score_cell(number: str, measured: Measured | None) -> Cell:
    if measured is None:
        return Cell()
    written = number_of(number).written
    if measured.low is None or measured.high is None:
        return Cell(written(measured.value), f"interval not known, n = {measured.n}")
    return Cell(written(measured.value), f"{written(measured.low)} to {written(measured.high)}, n = {measured.n}")


def _probe_cell(measured: Measured | None) -> Cell:
    if measured is None:
        return Cell()
    if measured.low == measured.high == measured.value:
        return Cell(f"{measured.value:,.0f}")
    spread = "interval not known" if measured.low is None else f"{measured.low:.4g} to {measured.high:.4g}"
    return Cell(f"{measured.value:.4g}", f"{spread}, n = {measured.n}")


def _score_table(caption: str, found: Numbers, encoders: Sequence[str]) -> Table:
    columns = [(task, number) for task, numbers in found.items() for number in numbers]
    rows = [(encoder, [_score_cell(number, found[task][number].get(encoder)) for task, number in columns]) for encoder in encoders]
    return Table(caption, [_head(task, number) for task, number in columns], rows)


def _head(task: str, name: str) -> str:
    number = number_of(name)
    return f"{task.replace('_', ' ')}: {number.label}" + (f" ({number.unit})" if number.unit else "")


def _probe_table(report: Report, probe: str) -> Table:
    """A probe's numbers, of the encoders that it measured; a few of many steps."""
    numbers = report.probes[probe]
    names = list(numbers)
    if len(names) > MOST_COLUMNS:
        names = [names[round(place * (len(names) - 1) / (MOST_COLUMNS - 1))] for place in range(MOST_COLUMNS)]
    rows = [
        (encoder, [_probe_cell(numbers[name].get(encoder)) for name in names])
        for encoder in report.encoders
        if any(encoder in numbers[name] for name in names)
    ]
    return Table(PROBES[probe].about, names, rows)


def tables(report: Report) -> list[Table]:
    """All tables of a report: scores, what each student loses, and a table for each probe."""
    scores = _score_table("Scores, with 95 % interval and number of prompts", report.tasks, report.encoders)
    caption = "Lost against the teacher on the same prompts and seeds (mean difference)"
    lost = [_score_table(caption, report.losses, report.encoders[1:])] if report.encoders[1:] and report.losses else []
    return [scores, *lost, *(_probe_table(report, probe) for probe in report.probes)]


def markdown(report: Report) -> str:
    """The report's tables: the scores as in the paper, then everything with its interval and count."""
    scores, *others = tables(report)
    parts = [f"# {report.suite}", "", _markdown_table(scores, spread=False), "", INTERVALS, ""]
    for one in (scores, *others):
        parts += [f"## {one.caption}", "", _markdown_table(one, spread=True), ""]
    return "\n".join(parts)


def _markdown_table(one: Table, spread: bool) -> str:
    def written(cell: Cell) -> str:
        return f"{cell.value} ({cell.spread})" if spread and cell.spread else cell.value

    rows = [[name, *map(written, cells)] for name, cells in one.rows]
    lines = [["Encoder", *one.heads], ["---"] * (len(one.heads) + 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
