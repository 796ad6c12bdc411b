"""The miniature's page: its tables are those of results.json, and code renews them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from distilled_t5.devtools.docs.miniature_tables import MARKS, PAGE, PLOT, RESULTS, SCALED, TABLES, blocks, plot, told
from distilled_t5.miniature.measure import MEASURED
from PIL import Image


def row(name: str, accuracy: float, **facts: Any) -> dict[str, Any]:
    score = {"accuracy": accuracy, "n": 200, "low": max(accuracy - 0.05, 0), "high": min(accuracy + 0.05, 1)}
    sizes = {"parameters_without_tokens": 300_000, "bytes": 3_700_000, "encode_ms": 4.2}
    return {"name": name, **sizes, **facts, "tasks": dict.fromkeys(MEASURED, score)}


PROBES = {
    "collapse": {"effective rank": {"value": 31.4159, "n": 210, "low": 30.0, "high": 33.0}},
    "velocity_gap": {"sigma 0.75-1.00": {"value": 0.00012345, "n": 56, "low": None, "high": None}},
}
FOUND: dict[str, Any] = {
    "teacher": row("teacher", 0.96)["tasks"],
    "teacher_facts": row("teacher", 0.96, parameters_without_tokens=1_300_000),
    "students": [
        row(SCALED[1], 0.95, share_of_teacher=0.9896, share_interval=[0.9712, 1.0031], probes=PROBES),
        row("context_free", 0.25, share_of_teacher=0.26, parameters_without_tokens=None),
    ],
    "pairs": [
        {
            "seed": 1,
            "following": 0.99,
            "naive": 0.8,
            "difference": 0.19,
            "interval": [0.16, 0.22],
            "n": 200,
            "minutes": [38.06, None],
        }
    ],
    "curve": [{"steps": 200, "training_s": 90.0, "share_of_teacher": 0.5, "n": 50}],
}
EMPTY = "\n".join(mark.format(name) for name in TABLES[PAGE] for mark in MARKS)


def test_tables_tell_accuracy_with_its_interval_and_share():
    page = told(f"before\n{EMPTY}\nafter", FOUND)
    [teacher] = [line for line in page.splitlines() if line.startswith("| teacher")]
    assert "96.0 (91-100)" in teacher
    quarter = next(line for line in page.splitlines() if line.startswith(f"| {SCALED[1]}"))
    assert re.search(r" 99\.0 % \(97\.1-100\.3\) \| +200 \|$", quarter)
    assert "300,000" in quarter
    [baseline] = [line for line in page.splitlines() if line.startswith("| context_free")]
    assert page.index(quarter) < page.index("end of scaling") < page.index(baseline) < page.index("end of ablation")
    assert re.search(r"\| 200 *\| +1\.5 \| +50\.0 % \| +50 \|", page)
    assert page.startswith("before\n")
    assert page.endswith("\nafter")


def test_collapse_and_velocity_gap_stand_beside_those_that_they_were_measured_of():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks(FOUND)["probes"].splitlines()]
    assert rows[0] == ["encoder", "effective rank", "gap, sigma 0.75-1.00"]
    assert rows[2:] == [[SCALED[1], "31.4 (30 to 33)", "0.000123"]]


def test_a_pair_is_told_with_the_interval_of_its_difference():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks(FOUND)["pairs"].splitlines()]
    assert rows[2] == ["1", "99.0 %", "80.0 %", "19.0 (16.0 to 22.0)", "200", "38.1", "-"]


def test_the_summary_has_the_teacher_as_the_whole_and_no_intervals():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks(FOUND)["summary"].splitlines()]
    assert [rows[2][0], rows[2][1], rows[2][-1]] == ["teacher", "1.30 M", "100.0 %"]
    assert [rows[3][0], rows[3][2], rows[3][-1]] == [SCALED[1], "95.0", "99.0 %"]


def test_renewing_twice_is_renewing_once():
    once = told(EMPTY, FOUND)
    assert told(once, FOUND) == once


def test_a_page_without_a_place_for_a_table_is_told():
    with pytest.raises(ValueError, match="0 places for the table `scaling`"):
        told("nothing", FOUND)


def test_the_plot_is_a_picture(tmp_path):
    plot(FOUND, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 2 * picture.height > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_the_shipped_results_tell_the_student_that_follows_from_the_one_that_imitates():
    """Mean distances of embeddings do not overlap, nor do the shares of the teacher."""
    found = {one["name"]: one for one in json.loads(RESULTS.read_text(encoding="utf-8"))["students"]}
    follows, imitates = found[SCALED[1]], found["quarter_naive"]
    assert (follows["objective"], imitates["objective"]) == ("embedding, then velocity", "embedding")
    assert follows["steps"] == imitates["steps"]
    distances = [one["probes"]["collapse"]["pooled distance"] for one in (follows, imitates)]
    assert distances[0]["high"] < distances[1]["low"]
    assert imitates["share_interval"][1] < follows["share_interval"][0]
    assert follows["share_of_teacher"] >= 0.97


def test_the_shipped_page_has_the_tables_of_the_shipped_results():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for path, names in TABLES.items():
        page = path.read_text(encoding="utf-8")
        assert told(page, found, names) == page
    assert set(blocks(found)) == {name for names in TABLES.values() for name in names}
    assert PLOT.is_file()
