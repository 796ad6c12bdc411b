"""The tables and the plot of the miniature are those of miniature/results.json."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from distilled_t5.devtools.docs.markdown import MARKS
from distilled_t5.devtools.docs.miniature_tables import COMMAND, PAGE, PLOT, SCALED, TABLES, plot, renewed, tables
from distilled_t5.devtools.miniature_results import RESULTS, TEACHER
from distilled_t5.world.scenes import NEW_IN_TASK
from PIL import Image


def row(name: str, accuracy: float, **facts: Any) -> dict[str, Any]:
    score = {"value": accuracy, "n": 200, "low": max(accuracy - 0.05, 0), "high": min(accuracy + 0.05, 1)}
    sizes = {"parameters_without_tokens": 300_000, "bytes": 3_700_000, "encode_ms": 4.2, "probes": {}}
    return {"name": name, **sizes, **facts, "tasks": dict.fromkeys(NEW_IN_TASK, score)}


def share(value: float, n: int = 200, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "n": n, "low": low, "high": high}


PROBES = {
    "collapse": {"effective rank": {"value": 31.4159, "n": 210, "low": 30.0, "high": 33.0}},
    "velocity_gap": {"sigma 0.75-1.00": {"value": 0.00012345, "n": 56, "low": None, "high": None}},
}
QUARTER = SCALED[2]
FOUND: dict[str, Any] = {
    "encoders": [
        row(TEACHER, 0.96, parameters_without_tokens=1_300_000),
        row(QUARTER, 0.95, share=share(0.9896, low=0.9712, high=1.0031), probes=PROBES),
        row("untrained", 0.25, share=share(0.26)),
    ],
    "pairs": [
        {"seed": 1, "following": 0.99, "naive": 0.8, "difference": share(0.19, low=0.16, high=0.22), "minutes": [38.06, None]},
    ],
    "sd3": {"encoders": [row(TEACHER, 0.95), row("sd3_student", 0.94, share=share(0.981, low=0.97, high=0.99))]},
    "curve": [{"steps": 200, "training_s": 90.0, "share": share(0.5, 50)}],
}
EMPTY = "\n".join(mark.format(name, COMMAND) for name in TABLES[PAGE] for mark in MARKS)


def test_tables_have_accuracy_and_share_with_intervals():
    page = renewed(f"before\n{EMPTY}\nafter", FOUND)
    teacher = next(line for line in page.splitlines() if line.startswith(f"| {TEACHER}"))
    assert "96.0 (91 to 100)" in teacher
    quarter = next(line for line in page.splitlines() if line.startswith(f"| {QUARTER}"))
    assert re.search(r" 99\.0 % \(97\.1 to 100\.3\) \| +200 \|$", quarter)
    assert "300,000" in quarter
    baseline = next(line for line in page.splitlines() if line.startswith("| untrained"))
    assert page.index(quarter) < page.index("end of scaling") < page.index(baseline) < page.index("end of ablation")
    assert re.search(r"\| 200 *\| +1\.5 \| +50\.0 % \| +50 \|", page)
    assert page.startswith("before\n")
    assert page.endswith("\nafter")


def test_probes_have_a_column_for_each_number_and_a_row_for_each_encoder():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables(FOUND)["probes"].splitlines()]
    assert rows[0] == ["encoder", "effective rank", "gap, sigma 0.75-1.00"]
    assert rows[2:] == [[TEACHER, "-", "-"], [QUARTER, "31.4 (30 to 33)", "0.000123"], ["untrained", "-", "-"]]


def test_a_pair_has_the_interval_of_its_difference():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables(FOUND)["pairs"].splitlines()]
    assert rows[2] == ["1", "99.0 %", "80.0 %", "19.0 (16.0 to 22.0)", "200", "38.1", "-"]


def test_the_summary_gives_the_teacher_100_percent_and_has_no_intervals():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables(FOUND)["summary"].splitlines()]
    assert [rows[2][0], rows[2][1], rows[2][-1]] == [TEACHER, "1.30 M", "100.0 %"]
    assert [rows[3][0], rows[3][2], rows[3][-1]] == [QUARTER, "95.0", "99.0 %"]


def test_renewing_twice_is_renewing_once():
    once = renewed(EMPTY, FOUND)
    assert renewed(once, FOUND) == once


def test_a_page_without_marks_is_an_error():
    with pytest.raises(ValueError, match="the marks of table `scaling` 0 times"):
        renewed("nothing", FOUND)


def test_the_plot_is_an_image(tmp_path):
    plot(FOUND, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 2 * picture.height > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_the_shipped_results_tell_the_student_that_follows_from_the_one_that_imitates():
    """Mean distances of embeddings do not overlap, nor do the shares of the teacher."""
    found = {one["name"]: one for one in json.loads(RESULTS.read_text(encoding="utf-8"))["encoders"]}
    follows, imitates = found[QUARTER], found["quarter_naive"]
    assert (follows["objective"], imitates["objective"]) == ("embedding, then velocity", "embedding")
    assert follows["steps"] == imitates["steps"]
    distances = [one["probes"]["collapse"]["pooled distance"] for one in (follows, imitates)]
    assert distances[0]["high"] < distances[1]["low"]
    assert imitates["share"]["high"] < follows["share"]["low"]
    assert follows["share"]["value"] >= 0.97


def test_the_shipped_page_has_the_tables_of_the_shipped_results():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for path, names in TABLES.items():
        page = path.read_text(encoding="utf-8")
        assert renewed(page, found, names) == page
    assert set(tables(found)) == {name for names in TABLES.values() for name in names}
    assert PLOT.is_file()
