"""The numbers of an evaluation: means, losses against the teacher, shares of it; and their tables, the first in the paper's form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .measured import Measured, mean, proportion, share
from .metrics import NUMBERS, PROBES, Number, number_of

# Values of images by task, number and encoder, in the order of the task's questions.
Scores = dict[str, dict[str, dict[str, list[float]]]]
# Measured numbers by group (a task or a probe), name and encoder.
Numbers = dict[str, dict[str, dict[str, Measured]]]
# Shares of the teacher by student and task, ALL among the tasks.
Shares = dict[str, dict[str, Measured]]
ALL = "all tasks"
# A share of a teacher that itself scores less says nothing.
LEAST_TEACHER = 0.1
MEANINGS = (
    (
        "share of the teacher",
        "The student's mean score divided by the teacher's, on the same prompts and seeds. All tasks: the student's mean over the tasks, "
        "divided by the teacher's.",
    ),
    ("lost", "By how much an image scores less than the teacher's image of the same prompt and seed, on average."),
)
MOST_COLUMNS = 6
SCORES = "Scores, with 95 % interval and number of prompts"
INTERVALS = (
    "95 % intervals: Wilson's for shares of correct images; the bootstrap's for means (of fewer than ten values Student's) and for shares "
    "of the teacher; the jackknife's for collapse. n: the number of prompts; of memory and time, the number of measurements."
)


def measured_scores(scores: Scores) -> Numbers:
    """The mean of every number over its images, by task, number and encoder."""
    return {
        task: {
            number: {encoder: _measured(number_of(number), values) for encoder, values in by_encoder.items()}
            for number, by_encoder in numbers.items()
        }
        for task, numbers in scores.items()
    }


def _measured(number: Number, values: Sequence[float]) -> Measured:
    return (proportion if number.proportion else mean)(values).within(0.0, number.most)


def losses(scores: Scores, teacher: str) -> Numbers:
    """By how much each student is worse than the teacher on the same prompts and seeds: the mean of the images' differences."""
    return {
        task: {
            number: {
                encoder: mean(_image_losses(number, by_encoder[teacher], values)).within(-most, most)
                for encoder, values in by_encoder.items()
                if encoder != teacher
            }
            for number, by_encoder in numbers.items()
            if teacher in by_encoder and (most := number_of(number).most)
        }
        for task, numbers in scores.items()
    }


def shares(scores: Scores, teacher: str, students: Sequence[str]) -> Shares:
    """Each student's score as a share of the teacher's, by task and over all of them.

    A task's score of an image is the mean over its numbers that are proportions of success. Tasks of which the teacher itself scores less
    than LEAST_TEACHER are left out.
    """
    found: Shares = {}
    of_teacher = {task: scored for task, numbers in scores.items() if (scored := _successes(numbers, teacher))}
    of_teacher = {task: scored for task, scored in of_teacher.items() if statistics.fmean(scored) >= LEAST_TEACHER}
    for student in students if of_teacher else ():
        of_student = {task: _successes(scores[task], student) for task in of_teacher}
        by_task = {task: share([of_student[task]], [scored]) for task, scored in of_teacher.items()}
        found[student] = {ALL: share([*of_student.values()], [*of_teacher.values()]), **by_task}
    return {student: {task: one.within(0.0, math.inf) for task, one in by_task.items()} for student, by_task in found.items()}


def _successes(numbers: Mapping[str, Mapping[str, Sequence[float]]], encoder: str) -> list[float]:
    """The mean of each image over the numbers that are proportions of success."""
    kept = [by_encoder[encoder] for name, by_encoder in numbers.items() if encoder in by_encoder and number_of(name).proportion]
    return [statistics.fmean(of_image) for of_image in zip(*kept, strict=True)]


def _image_losses(number: str, teacher: Sequence[float], student: Sequence[float]) -> list[float]:
    return [number_of(number).loss(one, other) for one, other in zip(teacher, student, strict=True)]


def picture_losses(scores: Scores, teacher: str, students: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """How much worse each student's image is than the teacher's, by task and student, in the order of the questions.

    An image's loss is the mean over the task's numbers, each as a share of its range; numbers without an upper end count only where a task
    has no others. Tasks without a score of each image are left out.
    """
    return {
        task: {student: _mean_losses(numbers, teacher, student) for student in students}
        for task, numbers in scores.items()
        if numbers and students
    }


def _mean_losses(numbers: Mapping[str, Mapping[str, Sequence[float]]], teacher: str, student: str) -> list[float]:
    each = []
    for number in ranged(numbers) or numbers:
        by_encoder, values = numbers[number], numbers[number][student]
        # A distance from the teacher is a loss itself.
        lost = _image_losses(number, by_encoder.get(teacher, [0.0] * len(values)), values)
        each.append([loss / number_of(number).span for loss in lost])
    return [statistics.fmean(of_image) for of_image in zip(*each, strict=True)]


def ranged(numbers: Iterable[str]) -> list[str]:
    """Those of some numbers whose range has an upper end."""
    return [name for name in numbers if math.isfinite(number_of(name).most)]


def to_json(numbers: Any) -> Any:
    """Nested numbers as JSON."""
    if isinstance(numbers, Measured):
        return numbers.to_json()
    return {name: to_json(part) for name, part in numbers.items()} if isinstance(numbers, Mapping) else numbers


@dataclass(frozen=True)
class Report:
    """All that tables and the page show: encoders in order, the teacher first; numbers and losses by task; probes by name; shares."""

    suite: str
    encoders: list[str]
    tasks: Numbers
    losses: Numbers
    probes: Numbers
    shares: Shares


def spaced(name: str) -> str:
    """The name of a task or encoder as it is read."""
    return name.replace("_", " ")


def written_share(share: Measured) -> str:
    """A share of the teacher with its interval, in percent."""
    if share.low is None or share.high is None:
        spread = f"identical on all {share.n}" if share.identical else f"no interval, n = {share.n}"
    else:
        spread = f"{100 * share.low:.0f} to {100 * share.high:.0f}"
    return f"{100 * share.value:.0f} % ({spread})"


def answer(report: Report, student: str) -> str:
    """What a student keeps of the teacher, in a sentence."""
    kept = {task: round(100 * share.value) for task, share in report.shares[student].items() if task != ALL}
    said = f"{student} keeps {written_share(report.shares[student][ALL]).replace('%', '% of the teacher', 1)}"
    least, most = min(kept.values()), max(kept.values())
    return f"{said}." if least == most else f"{said}: least in {_tasks_at(kept, least)}, most in {_tasks_at(kept, most)}."


def _tasks_at(kept: Mapping[str, int], percent: int) -> str:
    """The tasks with this percentage, by name if there are at most two."""
    tasks = [spaced(task) for task, of_task in kept.items() if of_task == percent]
    return f"{' and '.join(tasks) if len(tasks) <= 2 else f'{len(tasks)} tasks'} ({percent} %)"


def left_out(report: Report) -> str:
    """Which tasks have no share of the teacher, and why; "" if all of them have one."""
    without = [task for task in report.tasks if report.shares and all(task not in shares for shares in report.shares.values())]
    weak = [spaced(task) for task in without if any(number_of(name).proportion for name in report.tasks[task])]
    others = [spaced(task) for task in without if spaced(task) not in weak]
    reasons = ((weak, f"the teacher itself scores below {100 * LEAST_TEACHER:.0f} %"), (others, "no score counts successes"))
    return " ".join(f"Left out because {reason}: {', '.join(tasks)}." for tasks, reason in reasons if tasks)


def index(report: Report) -> list[tuple[str, str]]:
    """What the numbers of a report mean, by label."""
    names = {name for group in (report.tasks, report.probes) for numbers in group.values() for name in numbers}
    found = [(known, number) for known, number in NUMBERS.items() if any(name.startswith(known) for name in names)]
    return [*MEANINGS, *((number.label or known, number.meaning) for known, number in found)]


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


def _cell(name: str, measured: Measured | None, without: str = "no interval, n = {}") -> Cell:
    """A number as it is written; `without`: where there is no interval."""
    if measured is None:
        return Cell()
    number = number_of(name)
    if measured.low is None or measured.high is None:
        return Cell(number.written(measured.value), without.format(measured.n))
    if measured.low == measured.high == measured.value and measured.n == 1:
        return Cell(number.written(measured.value))
    return Cell(number.written(measured.value), f"{number.written(measured.low)} to {number.written(measured.high)}, n = {measured.n}")


def _lost_cell(name: str, measured: Measured | None) -> Cell:
    same = "identical on all {}" if measured and not measured.value else "the same on all {}"
    return _cell(name, measured, same if measured and measured.n > 1 else "n = {}")


def _score_table(caption: str, found: Numbers, encoders: Sequence[str], cell: Callable[[str, Measured | None], Cell], share: str) -> Table:
    """`share`: the unit of numbers in percent."""
    columns = [(task, number) for task, numbers in found.items() for number in numbers]
    rows = [(encoder, [cell(number, found[task][number].get(encoder)) for task, number in columns]) for encoder in encoders]
    return Table(caption, [f"{spaced(task)}: {number_of(number).head}".replace("%", share) for task, number in columns], rows)


def _probe_table(report: Report, probe: str) -> Table:
    """A probe's numbers, of the encoders that it measured; a few of many steps."""
    numbers = report.probes[probe]
    names = list(numbers)
    if len(names) > MOST_COLUMNS:
        names = [names[round(place * (len(names) - 1) / (MOST_COLUMNS - 1))] for place in range(MOST_COLUMNS)]
    rows = [
        (encoder, [_cell(name, numbers[name].get(encoder)) for name in names])
        for encoder in report.encoders
        if any(encoder in numbers[name] for name in names)
    ]
    return Table(PROBES[probe].about, [number_of(name).head for name in names], rows)


def tables(report: Report) -> list[Table]:
    """All tables of a report: scores, what each student loses, and a table for each probe."""
    scores = _score_table(SCORES, report.tasks, report.encoders, _cell, "%")
    caption = "Lost against the teacher, on the same prompts and seeds"
    has_losses = report.encoders[1:] and report.losses
    lost = [_score_table(caption, report.losses, report.encoders[1:], _lost_cell, "percentage points")] if has_losses else []
    return [scores, *lost, *(_probe_table(report, probe) for probe in report.probes)]


def summary(report: Report) -> str:
    """For a terminal: the answers, and scores and cost with a line for each number and a column for each encoder."""
    lines = [["", *report.encoders]]
    for table in tables(report):
        if len(table.rows) == len(report.encoders) and table.caption in (SCORES, PROBES["cost"].about):
            lines += [[head, *(cells[place].value for _, cells in table.rows)] for place, head in enumerate(table.heads)]
    if report.shares:
        lines.append(["share of the teacher, %", "", *(f"{100 * of_student[ALL].value:.0f}" for of_student in report.shares.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*(answer(report, student) for student in report.shares), "", *aligned])


def markdown(report: Report) -> str:
    """The answers, and the report's tables: the scores as in the paper, then everything with its interval and count."""
    scores, *others = tables(report)
    parts = [f"# {report.suite}", "", *(f"{answer(report, student)}\n" for student in report.shares)]
    parts += [_markdown_table(scores, spread=False), "", INTERVALS, ""]
    for one in (scores, *others):
        parts += [f"## {one.caption}", "", _markdown_table(one, spread=True), ""]
    return "\n".join(parts)


def _markdown_table(one: Table, spread: bool) -> str:
    def written(cell: Cell) -> str:
        return f"{cell.value} ({cell.spread})" if spread and cell.spread else cell.value

    rows = [[name, *map(written, cells)] for name, cells in one.rows]
    lines = [["Encoder", *one.heads], ["---"] * (len(one.heads) + 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
