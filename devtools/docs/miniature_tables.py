"""What miniature/results.json says, as tables between the marks of README.md and miniature/README.md, and as a plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...benchmarks.support.measuring import table
from ..comfyui.in_process import ROOT
from ..miniature import SIZES

RESULTS, PAGE, PLOT = ROOT / "miniature" / "results.json", ROOT / "miniature" / "README.md", ROOT / "assets" / "miniature-scaling.png"
SCALED = [f"miniature_student_{size}" for size in SIZES]
README = ROOT / "README.md"
TABLES = {PAGE: ("scaling", "ablation", "pairs", "probes", "curve"), README: ("summary",)}
MARKS = "<!-- {0}: python dev.py miniature -->\n\n", "\n\n<!-- end of {0} -->"


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """Every table by the name of its marks."""
    by_name = {student["name"]: student for student in found["students"]}
    others = [name for name in by_name if name not in SCALED]
    return {
        "scaling": _accuracies([found["teacher_facts"], *(by_name[name] for name in SCALED if name in by_name)]),
        "ablation": _accuracies([by_name[name] for name in others]),
        "pairs": _pairs(found.get("pairs", [])),
        "probes": _probes([found["teacher_facts"], *found["students"]]),
        "summary": _summary([found["teacher_facts"], *(by_name[name] for name in SCALED if name in by_name)]),
        "curve": table(["optimizer steps", "minutes", "share of teacher", "n of each task"], [_point(point) for point in found["curve"]]),
    }


def _accuracies(students: Sequence[dict[str, Any]]) -> str:
    tasks = list(students[0]["tasks"])
    head = [
        "encoder",
        "weights without tokens",
        "MB",
        "encode, ms",
        *(name.replace("_", " ") for name in tasks),
        "share of teacher",
        "n of each",
    ]
    return table(head, [_row(student, tasks) for student in students])


def _summary(students: Sequence[dict[str, Any]]) -> str:
    """The scaling table without intervals, for a reader in a hurry."""
    tasks = list(students[0]["tasks"])
    rows = []
    for student in students:
        share, right = student.get("share_of_teacher", 1.0), [f"{100 * student['tasks'][task]['accuracy']:.1f}" for task in tasks]
        rows.append([student["name"], f"{student['parameters_without_tokens'] / 1e6:.2f} M", *right, f"{100 * share:.1f} %"])
    return table(["encoder", "weights without tokens", *(name.replace("_", " ") for name in tasks), "share of teacher"], rows)


def _row(student: dict[str, Any], tasks: Sequence[str]) -> list[Any]:
    weights = student.get("parameters_without_tokens")
    size = f"{student['bytes'] / 1e6:.1f}"
    told = [_percent(student["tasks"][task]) for task in tasks]
    return [
        student["name"],
        f"{weights:,}" if weights else None,
        size,
        student["encode_ms"],
        *told,
        _share(student),
        next(iter(student["tasks"].values()))["n"],
    ]


def _pairs(pairs: Sequence[dict[str, Any]]) -> str:
    """What following is worth at equal steps, by seed."""
    head = ["seed", "follows", "imitates", "difference", "n of each", "minutes, follows", "minutes, imitates"]
    return table(head, [_pair(one) for one in pairs])


def _pair(one: dict[str, Any]) -> list[Any]:
    interval = one["interval"]
    spread = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    shares = [f"{100 * one[name]:.1f} %" for name in ("following", "naive")]
    minutes = [None if value is None else f"{value:.1f}" for value in one["minutes"]]
    return [one["seed"], *shares, f"{100 * one['difference']:.1f}{spread}", one["n"], *minutes]


def _share(told: dict[str, Any]) -> str | None:
    """What is kept of the teacher, with its 95 % interval where it is known."""
    if told.get("share_of_teacher") is None:
        return None
    interval = told.get("share_interval")
    spread = f" ({100 * interval[0]:.1f}-{100 * interval[1]:.1f})" if interval else ""
    return f"{100 * told['share_of_teacher']:.1f} %{spread}"


def _probes(encoders: Sequence[dict[str, Any]]) -> str:
    """Collapse and velocity gap, of those of which they were measured."""
    measured = [encoder for encoder in encoders if encoder.get("probes")]
    names = list(dict.fromkeys((probe, name) for encoder in measured for probe, numbers in encoder["probes"].items() for name in numbers))
    head = ["encoder", *(name if probe == "collapse" else f"gap, {name}" for probe, name in names)]
    return table(head, [[encoder["name"], *(_probe(encoder["probes"], *name) for name in names)] for encoder in measured])


def _probe(probes: dict[str, Any], probe: str, name: str) -> str | None:
    """A number with its 95 % interval."""
    one = probes.get(probe, {}).get(name)
    if one is None:
        return None
    spread = "" if one["low"] is None else f" ({one['low']:.3g} to {one['high']:.3g})"
    return f"{one['value']:.3g}{spread}"


def _percent(score: dict[str, Any]) -> str:
    """Accuracy in percent with its 95 % interval."""
    return f"{100 * score['accuracy']:.1f} ({100 * score['low']:.0f}-{100 * score['high']:.0f})"


def _point(point: dict[str, Any]) -> list[Any]:
    return [point["steps"], f"{point['training_s'] / 60:.1f}", _share(point), point["n"]]


def told(page: str, found: dict[str, Any], names: Sequence[str] = TABLES[PAGE]) -> str:
    """The page with these tables as `found` has them. Raises ValueError if a table has no marks there."""
    for name in names:
        text = blocks(found)[name]
        start, end = (mark.format(name) for mark in MARKS)
        page, count = re.subn(re.escape(start) + ".*?" + re.escape(end), lambda _, new=start + text + end: new, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"The page has {count} places for the table `{name}`; one was expected, between {start.strip()} and {end.strip()}."
            )
    return page


def write(found: dict[str, Any]) -> None:
    """Renew the pages' tables and the plot."""
    for page, names in TABLES.items():
        page.write_text(told(page.read_text(encoding="utf-8"), found, names), encoding="utf-8")
    plot(found, PLOT)


def plot(found: dict[str, Any], path: Path) -> None:
    """Accuracy against the encoder's size, a line per task, and what the middle student kept of the teacher against its steps."""
    from matplotlib.figure import Figure

    by_name = {student["name"]: student for student in found["students"]}
    scaled = [by_name[name] for name in reversed(SCALED) if name in by_name] + [found["teacher_facts"]]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    sizes = [student["parameters_without_tokens"] / 1e6 for student in scaled]
    for task in found["teacher"]:
        scores = [student["tasks"][task] for student in scaled]
        reach = [[score["accuracy"] - score["low"] for score in scores], [score["high"] - score["accuracy"] for score in scores]]
        left.errorbar(sizes, [score["accuracy"] for score in scores], reach, marker="o", capsize=2, label=task.replace("_", " "))
    left.set(
        xscale="log",
        ylim=(-0.02, 1.02),
        xlabel="weights without the token table, millions (right: the teacher)",
        ylabel="right pictures, share",
    )
    left.legend(fontsize=8)
    curve = found["curve"]
    right.plot([point["steps"] for point in curve], [point["share_of_teacher"] for point in curve], marker="o")
    right.set(ylim=(-0.02, 1.05), xlabel="optimizer steps of the student of a quarter", ylabel="share of the teacher's accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
