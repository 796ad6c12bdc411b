"""miniature/results.json as tables between marks in docs/lab.md and miniature/README.md, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..commands import ROOT
from ..miniature_results import SIZES, TEACHER
from .markdown import between_marks, table

LAB, PAGE = ROOT / "docs" / "lab.md", ROOT / "miniature" / "README.md"
PLOT = ROOT / "assets" / "miniature-scaling.png"
SCALED = (TEACHER, *(f"miniature_student_{size}" for size in SIZES))
TABLES = {PAGE: ("scaling", "ablation", "pairs", "probes", "curve", "sd3"), LAB: ("summary", "sd3_summary")}
COMMAND = "python dev.py miniature"
Row = Mapping[str, Any]


def tables(found: Row) -> dict[str, str]:
    """Every table by the name in its marks."""
    by_name = {one["name"]: one for one in found["encoders"]}
    scaled = [by_name[name] for name in SCALED if name in by_name]
    others = [one for name, one in by_name.items() if name not in SCALED]
    return {
        "scaling": accuracies(scaled),
        "ablation": accuracies(others),
        "pairs": table(["seed", "follows", "imitates", "difference", "n of each", "minutes, follows", "minutes, imitates"], pairs(found)),
        "probes": probes(found["encoders"]),
        "summary": summary(scaled),
        "sd3": accuracies(found["sd3"]["encoders"]),
        "sd3_summary": summary(found["sd3"]["encoders"]),
        "curve": table(["optimizer steps", "minutes", "share of teacher", "n of each task"], curve(found)),
    }


def percent(one: Row | None, unit: str = "", digits: int = 1) -> str | None:
    """A share with its 95 % interval, in percent."""
    if one is None:
        return None
    spread = "" if one["low"] is None else f" ({100 * one['low']:.{digits}f} to {100 * one['high']:.{digits}f})"
    return f"{100 * one['value']:.1f}{unit}{spread}"


def accuracies(encoders: Sequence[Row]) -> str:
    """Sizes, right images of each task and share of the teacher, with intervals."""
    tasks = list(encoders[0]["tasks"]) if encoders else []
    names = [task.replace("_", " ") for task in tasks]
    head = ["encoder", "weights without tokens", "MB", "encode, ms", *names, "share of teacher", "n of each"]
    rows = [
        [
            one["name"],
            f"{one['parameters_without_tokens']:,}",
            f"{one['bytes'] / 1e6:.1f}",
            one["encode_ms"],
            *(percent(one["tasks"][task], digits=0) for task in tasks),
            percent(one.get("share"), " %"),
            one["tasks"][tasks[0]]["n"],
        ]
        for one in encoders
    ]
    return table(head, rows)


def summary(encoders: Sequence[Row]) -> str:
    """The scaling table without intervals."""
    tasks = list(encoders[0]["tasks"])
    rows = []
    for one in encoders:
        shares = [*(one["tasks"][task]["value"] for task in tasks), one.get("share", {"value": 1.0})["value"]]
        *right, kept = (f"{100 * share:.1f}" for share in shares)
        rows.append([one["name"], f"{one['parameters_without_tokens'] / 1e6:.2f} M", *right, f"{kept} %"])
    return table(["encoder", "weights without tokens", *(task.replace("_", " ") for task in tasks), "share of teacher"], rows)


def pairs(found: Row) -> list[list[Any]]:
    """Rows of the students that follow and that imitate, by seed."""
    return [
        [
            one["seed"],
            *(f"{100 * one[name]:.1f} %" for name in ("following", "naive")),
            percent(one["difference"]),
            one["difference"]["n"],
            *(None if minutes is None else f"{minutes:.1f}" for minutes in one["minutes"]),
        ]
        for one in found["pairs"]
    ]


def curve(found: Row) -> list[list[Any]]:
    """Rows of the middle student's checkpoints."""
    return [[one["steps"], f"{one['training_s'] / 60:.1f}", percent(one["share"], " %"), one["share"]["n"]] for one in found["curve"]]


def probes(encoders: Sequence[Row]) -> str:
    """Collapse and velocity gap."""
    names = list(dict.fromkeys((probe, name) for one in encoders for probe, numbers in one["probes"].items() for name in numbers))
    head = ["encoder", *(name if probe == "collapse" else f"gap, {name}" for probe, name in names)]
    return table(head, [[one["name"], *(significant(one["probes"].get(probe, {}).get(name)) for probe, name in names)] for one in encoders])


def significant(one: Row | None) -> str | None:
    """A number and its interval in three significant digits."""
    if one is None:
        return None
    return f"{one['value']:.3g}" + ("" if one["low"] is None else f" ({one['low']:.3g} to {one['high']:.3g})")


def renewed(page: str, found: Row, names: Sequence[str] = TABLES[PAGE]) -> str:
    """The page with these tables. Raises ValueError if it does not have the marks of a table exactly once."""
    for name in names:
        page = between_marks(page, name, tables(found)[name], COMMAND)
    return page


def write(found: Row) -> None:
    """Renew the tables of the pages and the plot."""
    for page, names in TABLES.items():
        page.write_text(renewed(page.read_text(encoding="utf-8"), found, names), encoding="utf-8")
    plot(found, PLOT)


def plot(found: Row, path: Path) -> None:
    """Accuracy by size, a line per task; and the share of the teacher by optimizer steps of the middle student."""
    from matplotlib.figure import Figure

    by_name = {one["name"]: one for one in found["encoders"]}
    scaled = [by_name[name] for name in reversed(SCALED) if name in by_name]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    sizes = [one["parameters_without_tokens"] / 1e6 for one in scaled]
    for task in scaled[0]["tasks"]:
        scores = [one["tasks"][task] for one in scaled]
        reach = [[score["value"] - score["low"] for score in scores], [score["high"] - score["value"] for score in scores]]
        left.errorbar(sizes, [score["value"] for score in scores], reach, marker="o", capsize=2, label=task.replace("_", " "))
    left.set(xscale="log", ylim=(-0.02, 1.02), xlabel="weights without the token table, millions", ylabel="share of right images")
    left.legend(fontsize=8)
    right.plot([one["steps"] for one in found["curve"]], [one["share"]["value"] for one in found["curve"]], marker="o")
    right.set(ylim=(-0.02, 1.05), xlabel="optimizer steps of the student of a quarter", ylabel="share of the teacher's accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
