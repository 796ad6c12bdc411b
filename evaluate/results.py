"""What an evaluation leaves: results.json, and the same numbers as Markdown tables, the first in the form of the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .intervals import Measured, mean_of, mean_of_differences

# Values of pictures by task, number and encoder, in the order of the task's questions.
Scores = dict[str, dict[str, dict[str, list[float]]]]
MOST_COLUMNS = 6
INTERVALS = (
    "95 % intervals: Wilson's for shares of right pictures, the bootstrap's for means (Student's of fewer than ten), "
    "the jackknife's for collapse."
)
PROBES = {
    "collapse": "Collapse: mean distance of pooled embeddings, and how many directions they fill",
    "velocity_gap": "Velocity gap to the teacher by noise level",
    "latent_distance": "Distance of the latents from the teacher's (root mean square)",
    "cost": "Memory and time",
}


@dataclass(frozen=True)
class Shown:
    """How a number is written: its name, factor, digits after the point, whether more is better; and the width of its range."""

    name: str
    factor: float = 100.0
    digits: int = 1
    more_is_better: bool = True
    whole: float = 1.0


SHOWN = {
    "readback": Shown("right"),
    "ocr_character": Shown("characters"),
    "ocr_word": Shown("words"),
    "ocr_sentence": Shown("sentences"),
    "clip_score": Shown("CLIP", 1.0, 2, whole=100.0),
    "FID": Shown("FID", 1.0, 2, more_is_better=False),
    "lpips": Shown("LPIPS", 1.0, 3, more_is_better=False),
}


def shown(number: str) -> Shown:
    """How a number is written; what is not listed is an accuracy in percent under its own name."""
    if number.startswith("FID"):
        return replace(SHOWN["FID"], name=number)
    return SHOWN.get(number, Shown(number.replace("_", " ")))


def measured_scores(scores: Scores) -> dict[str, dict[str, dict[str, Measured]]]:
    """The mean of every number over its pictures, by task, number and encoder."""
    return {
        task: {number: {encoder: mean_of(values) for encoder, values in by_encoder.items()} for number, by_encoder in numbers.items()}
        for task, numbers in scores.items()
    }


def losses(scores: Scores, teacher: str) -> dict[str, dict[str, dict[str, Measured]]]:
    """By how much each student is worse than the teacher on the same prompts and seeds: the mean of the pictures' differences."""
    return {
        task: {
            number: {
                encoder: mean_of_differences([_loss(number, one, other) for one, other in zip(by_encoder[teacher], values, strict=True)])
                for encoder, values in by_encoder.items()
                if encoder != teacher
            }
            for number, by_encoder in numbers.items()
            if teacher in by_encoder
        }
        for task, numbers in scores.items()
    }


def _loss(number: str, teacher: float, student: float) -> float:
    return teacher - student if shown(number).more_is_better else student - teacher


def picture_losses(scores: Scores, teacher: str, students: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """How much worse each student's picture is than the teacher's, by task and student, in the order of the questions.

    A picture's loss is the mean over the task's numbers, each as a share of its range; tasks that rate no picture by itself are left out.
    """
    return {
        task: {student: _of_pictures(numbers, teacher, student) for student in students}
        for task, numbers in scores.items()
        if numbers and students
    }


def _of_pictures(numbers: Mapping[str, Mapping[str, Sequence[float]]], teacher: str, student: str) -> list[float]:
    each = []
    for number, by_encoder in numbers.items():
        # A distance from the teacher is a loss as it is.
        before = by_encoder.get(teacher, [0.0] * len(by_encoder[student]))
        each.append([_loss(number, one, other) / shown(number).whole for one, other in zip(before, by_encoder[student], strict=True)])
    return [statistics.fmean(of_picture) for of_picture in zip(*each, strict=True)]


def to_json(numbers: Any) -> Any:
    """Nested numbers as JSON."""
    if isinstance(numbers, Measured):
        return numbers.to_json()
    return {name: to_json(part) for name, part in numbers.items()} if isinstance(numbers, Mapping) else numbers


@dataclass(frozen=True)
class Report:
    """All that tables and the page show: encoders in order, the teacher first; numbers by task; probes by name."""

    suite: str
    encoders: list[str]
    tasks: dict[str, dict[str, dict[str, Measured]]]
    losses: dict[str, dict[str, dict[str, Measured]]]
    probes: dict[str, dict[str, dict[str, Measured]]]


@dataclass(frozen=True)
class Cell:
    """A number as it is written, and its interval and count as they are."""

    value: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Table:
    """A row per encoder, a column per number."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def score_cell(number: str, measured: Measured | None) -> Cell:
    """A score as tables write it."""
    if measured is None:
        return Cell()
    how = shown(number)
    value, *bounds = (
        None if one is None else f"{how.factor * one:.{how.digits}f}" for one in (measured.value, measured.low, measured.high)
    )
    spread = "interval not known" if None in bounds else " to ".join(map(str, bounds))
    return Cell(str(value), f"{spread}, n = {measured.n}")


def _probe_cell(measured: Measured | None) -> Cell:
    if measured is None:
        return Cell()
    if measured.low == measured.high == measured.value:
        return Cell(f"{measured.value:,.0f}")
    spread = "interval not known" if measured.low is None else f"{measured.low:.4g} to {measured.high:.4g}"
    return Cell(f"{measured.value:.4g}", f"{spread}, n = {measured.n}")


def score_table(report: Report) -> Table:
    """The form of the paper's table: every task's numbers in one row."""
    columns = [(task, number) for task, numbers in report.tasks.items() for number in numbers]
    heads = [f"{task.replace('_', ' ')}: {shown(number).name}" for task, number in columns]
    rows = [
        (encoder, [score_cell(number, report.tasks[task][number].get(encoder)) for task, number in columns]) for encoder in report.encoders
    ]
    return Table("Scores, with 95 % interval and number of prompts", heads, rows)


def loss_table(report: Report) -> Table:
    """What each student loses against the teacher on the same prompts and seeds."""
    columns = [(task, number) for task, numbers in report.losses.items() for number in numbers]
    heads = [f"{task.replace('_', ' ')}: {shown(number).name}" for task, number in columns]
    rows = [
        (encoder, [score_cell(number, report.losses[task][number].get(encoder)) for task, number in columns])
        for encoder in report.encoders[1:]
    ]
    return Table("Lost against the teacher on the same prompts and seeds (mean difference)", heads, rows)


def probe_table(report: Report, probe: str) -> Table:
    """A probe's numbers, of the encoders that it measured; of many steps a few."""
    numbers = report.probes[probe]
    names = list(numbers)
    if len(names) > MOST_COLUMNS:
        names = [names[round(place * (len(names) - 1) / (MOST_COLUMNS - 1))] for place in range(MOST_COLUMNS)]
    rows = [
        (encoder, [_probe_cell(numbers[name].get(encoder)) for name in names])
        for encoder in report.encoders
        if any(encoder in numbers[name] for name in names)
    ]
    return Table(PROBES.get(probe, probe), names, rows)


def tables(report: Report) -> list[Table]:
    """All tables of a report, the scores first."""
    lost = [loss_table(report)] if report.encoders[1:] and report.losses else []
    return [score_table(report), *lost, *(probe_table(report, probe) for probe in report.probes)]


def markdown(report: Report) -> str:
    """The report's tables: the scores as the paper writes them, then everything with its interval and count."""
    plain = score_table(report)
    parts = [f"# {report.suite}", "", _markdown_table(plain, spread=False), ""]
    parts += [INTERVALS, ""]
    for one in tables(report):
        parts += [f"## {one.caption}", "", _markdown_table(one, spread=True), ""]
    return "\n".join(parts)


def _markdown_table(one: Table, spread: bool) -> str:
    def written(cell: Cell) -> str:
        return f"{cell.value} ({cell.spread})" if spread and cell.spread else cell.value

    rows = [[name, *map(written, cells)] for name, cells in one.rows]
    lines = [["Encoder", *one.heads], ["---"] * (len(one.heads) + 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
