"""The charts of the page as files for papers and slides: PNG and SVG, by matplotlib."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.disk import replace_file
from ..runtime.optional import needed
from .embeddings import COLOURS
from .results import ALL, Report, spaced

KINDS = ("png", "svg")
DPI = 150
log = logging.getLogger(__name__)


def write_plots(folder: Path, report: Report, maps: Mapping[str, Any]) -> None:
    """Write the chart of shares and the maps (figures by name) into a folder; without matplotlib the log says what to install."""
    try:
        figures = {f"embeddings_{name.replace(' ', '_')}": figure for name, figure in maps.items()}
        figures |= {"share_of_teacher": shares_figure(report)} if report.shares else {}
    except ValueError as missing:
        log.warning("%s", missing)
        return
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        for kind in KINDS:
            replace_file(folder / f"{name}.{kind}", plot_file(figure, kind))


def plot_file(figure: Any, kind: str) -> bytes:
    """A figure of matplotlib as a file of this kind, the same in every run."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "distilled-t5"}):
        figure.savefig(content, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return content.getvalue()


def shares_figure(report: Report) -> Any:
    """Each student's share of the teacher by task, with its interval. Raises ValueError without matplotlib."""
    figures = needed("matplotlib.figure", "matplotlib", "The chart in plots/")
    tasks, students = [*dict.fromkeys(task for shares in report.shares.values() for task in shares)], [*report.shares]
    figure = figures.Figure(figsize=(7, 1.2 + 0.22 * len(tasks) * (len(students) + 1)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(100, color="#888888", linewidth=1)
    for number, student in enumerate(students):
        colour, off = COLOURS[number % len(COLOURS)], (number + 1) / (len(students) + 1) - 0.5
        for place, task in enumerate(tasks):
            share = report.shares[student][task]
            if share.low is not None and share.high is not None:
                axes.plot([100 * share.low, 100 * share.high], [place + off] * 2, color=colour, linewidth=2)
            axes.plot(100 * share.value, place + off, "o", color=colour, label=student if task == ALL else None)
    axes.set(yticks=range(len(tasks)), yticklabels=[spaced(task) for task in tasks], xlabel="share of the teacher, %", title=report.suite)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return figure
