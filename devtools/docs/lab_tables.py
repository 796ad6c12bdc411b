"""benchmarks/results/lab.json as tables between marks in docs/lab.md and miniature/README.md, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..commands import ROOT
from .markdown import between_marks, table
from .miniature_tables import LAB, PAGE, percent

PLOT = ROOT / "assets" / "lab-{0}.png"
IMAGE = "\n\n![Share of the teacher against floating-point operations](../assets/lab-{0}.png)"
COMMAND = "python dev.py lab"
# Smaller shares, in percent, are drawn here.
LEAST = 60
TABLES = {PAGE: ("arms", "claims"), LAB: ("claims",)}
Row = Mapping[str, Any]


def tables(found: Row) -> dict[str, str]:
    """The tables of one family by name."""
    return {"arms": arms(found), "claims": claims(found)}


def arms(found: Row) -> str:
    """The arms by their arithmetic."""
    tasks = list(found["teacher"])
    names = [task.replace("_", " ") for task in tasks]
    head = ["objectives", "optimizer steps", "TFLOP", "of the base's", "captions", "share of teacher", "each seed", "n of each", *names]
    rows = [_arm(one, tasks) for one in sorted(found["arms"], key=lambda one: one["tflop"])]
    right = [percent(found["teacher"][task], digits=0) for task in tasks]
    teacher = ["the teacher", *[None] * 6, found["teacher"][tasks[0]]["n"], *right]
    return table(head, [teacher, *rows])


def _arm(one: Row, tasks: Sequence[str]) -> list[Any]:
    seeds = ", ".join([*(f"{100 * seed['share']:.1f}" for seed in one["seeds"]), *("failed" for _ in one["failed"])])
    right = [percent(one["tasks"][task], digits=0) if one["seeds"] else None for task in tasks]
    arithmetic, share = (f"{one['tflop']:.3g}", f"{one['of_base']:.2f}", f"{one['captions']:,}"), one.get("share")
    return [one["title"], one["stages"], *arithmetic, percent(share, " %"), seeds, share and share["n"], *right]


def claims(found: Row) -> str:
    """The questions and the differences that answer them."""
    titles = {one["name"]: f"{one['title']} ({one['of_base']:.2f})" for one in found["arms"]}
    rows = [
        [
            one["question"],
            f"{titles[one['arm']]} against {titles[one['against']]}" + (f", {one['task'].replace('_', ' ')}" if "task" in one else ""),
            percent(one["difference"]),
            ", ".join(f"{100 * seed:.1f}" for seed in one["seeds"]),
            one["over_runs"] and " to ".join(f"{100 * bound:.1f}" for bound in one["over_runs"]),
            "yes" if one["clear"] else "no",
        ]
        for one in found["claims"]
    ]
    return table(["question", "compared (arithmetic)", "difference, points", "each seed", "over runs", "clear"], rows)


def marked(family: str, name: str) -> str:
    """The name of a table in its marks."""
    return f"lab_{family}_{name}"


def renewed(page: str, found: Row, names: Sequence[str]) -> str:
    """The page with these tables of every family in the results. Raises ValueError as `between_marks`."""
    for family, of_family in found.items():
        made = tables(of_family)
        for name in names:
            image = IMAGE.format(family) if name == "arms" else ""
            page = between_marks(page, marked(family, name), made[name] + image, COMMAND)
    return page


def write(found: Row) -> None:
    """Renew the tables of the pages and the plots."""
    for page, names in TABLES.items():
        page.write_text(renewed(page.read_text(encoding="utf-8"), found, names), encoding="utf-8")
    for family, of_family in found.items():
        plot(of_family, Path(str(PLOT).format(family)))


def plot(found: Row, path: Path) -> None:
    """Share of the teacher against arithmetic; arms of one title, which differ in their steps, are joined by a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    measured = sorted((one for one in found["arms"] if one["seeds"]), key=lambda one: (one["title"], one["tflop"]))
    for number, (title, of_title) in enumerate(groupby(measured, key=lambda one: one["title"])):
        points = list(of_title)
        shares = [one["share"] for one in points]
        reach = [[_reach(share, "low") for share in shares], [_reach(share, "high") for share in shares]]
        style = {"marker": "osD^vP*"[number // 10 % 7], "color": f"C{number % 10}", "capsize": 2, "linewidth": 1, "label": title}
        axes.errorbar([one["tflop"] for one in points], [max(LEAST, 100 * share["value"]) for share in shares], reach, **style)
    axes.axhline(100, color="#888888", linewidth=1)
    axes.set(
        xscale="log",
        xlabel="floating-point operations of a student's training, 10^12",
        ylabel=f"share of the teacher, % ({LEAST}: or less)",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _reach(share: Row, bound: str) -> float:
    return 0.0 if share[bound] is None or 100 * share["value"] < LEAST else 100 * abs(share["value"] - share[bound])
