"""The benchmark of the trainer's step runs, compares what is the same, and reports all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RATES = {"step_s", "step_cpu_s", "steps_per_s", "samples_per_s", "losses"}
JUDGED = {"ratio", "ratio_cpu", "floor_s", "floor_cpu_s", "floor_share", "floor_share_cpu", "sample_cost", "sample_cost_cpu"}
TORCHS = "ours with torch's checkpointing"


@pytest.fixture(scope="module")
def result(comfyui_path: Path, pack_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `train_step.py --quick` wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "python").mkdir()
    (folder / "python" / "distilled_t5").symlink_to(pack_root, target_is_directory=True)
    script, out = pack_root / "benchmarks" / "train_step.py", folder / "out"
    environment = {**os.environ, "PYTHONPATH": str(folder / "python"), "COMFYUI_PATH": str(comfyui_path)}
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(out)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = out.iterdir()
    assert written.name in done.stdout
    return json.loads(written.read_text(encoding="utf-8"))


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["cases"]["tiny"]["weights"]["fp32"]["rows"]


def test_every_order_of_work_gives_the_same_losses(result):
    for row in rows_of(result):
        losses = row["ours"]["losses"]
        assert len(losses) == 2 and min(losses) > 0
        assert all(row[order]["losses"] == losses for order in ("authors", TORCHS) if order in row)


def test_rows_hold_rates_ratios_and_shares_with_and_without_checkpointing(result):
    rows = rows_of(result)
    assert [(row["checkpointing"], row["batch"]) for row in rows] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    for row in rows:
        assert row.keys() >= JUDGED | {"encode_s", "ours", "authors"}
        assert row["ours"].keys() >= RATES and row["authors"].keys() >= RATES
        assert row["ours"]["samples_per_s"] == pytest.approx(row["batch"] * row["ours"]["steps_per_s"])
        assert row["ratio"] == pytest.approx(row["authors"]["step_s"] / row["ours"]["step_s"])
        assert (TORCHS in row) == ("checkpoint_ratio_cpu" in row) == row["checkpointing"]
    assert [row["sample_cost"] for row in rows if row["batch"] == 1] == [1, 1]


def test_memory_is_that_of_fresh_processes(result):
    rows = result["cases"]["tiny"]["weights"]["fp32"]["memory"]
    assert [(row["order"], row["checkpointing"]) for row in rows] == [(o, c) for c in (False, True) for o in ("ours", "authors")]
    assert all(0 < row["loaded_gb"] < row["peak_gb"] < 4 for row in rows)


def test_the_result_says_where_it_was_measured_and_what_the_real_sizes_would_share(result):
    assert {"commit", "cpu", "torch", "comfyui", "torch_threads", "load_average_at_start"} <= result["machine"].keys()
    assert result["machine"]["torch_threads"] == 1
    shares = result["real_teacher_share"]
    assert 0.01 < shares["77"] < shares["256"] < shares["512"] < 0.1
    assert 3 < result["cases"]["tiny"]["checkpointed_forwards"] < 4
