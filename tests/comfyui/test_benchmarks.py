"""Every benchmark runs and writes its numbers; the losses of both orders of a training step are equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.comfyui.server import link_folder

pytestmark = pytest.mark.one_host

RATES = {"step_s", "step_cpu_s", "steps_per_s", "samples_per_s", "losses"}
JUDGED = {"ratio", "ratio_cpu", "floor_s", "floor_cpu_s", "floor_share", "floor_share_cpu", "sample_cost", "sample_cost_cpu"}


Quick = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def quick(comfyui_path: Path, pack_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Runs a benchmark with --quick; returns what it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "python").mkdir()
    link_folder(folder / "python" / "distilled_t5", pack_root)
    environment = {**os.environ, "PYTHONPATH": str(folder / "python"), "COMFYUI_PATH": str(comfyui_path)}

    def run(name: str) -> dict[str, Any]:
        command = [sys.executable, str(pack_root / "benchmarks" / f"{name}.py"), "--quick", "--out", str(folder / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (written,) = (folder / name).iterdir()
        assert written.name in done.stdout.splitlines()[-1]
        found = json.loads(written.read_text(encoding="utf-8"))
        assert {"commit", "cpu", "torch", "comfyui", "torch_threads", "load_average_at_start"} <= found["machine"].keys()
        return found

    return run


@pytest.fixture(scope="module")
def result(quick: Quick) -> dict[str, Any]:
    """What `train_step.py --quick` wrote."""
    return quick("train_step")


def test_every_benchmark_is_tried_here(pack_root: Path) -> None:
    assert {path.stem for path in (pack_root / "benchmarks").glob("*.py")} == {"encode", "precision", "start", "train_step"}


def test_encode_measures_load_encode_memory_and_a_picture(quick: Quick) -> None:
    found = quick("encode")
    base, whole = found["encoders"]["base"], found["encoders"]["xxl-bf16"]
    assert base["t5_weights_gb"] == pytest.approx(0.259, abs=0.001)
    assert base["tokens"] == whole["tokens"] == 256
    for key in ("load_cold_s", "load_warm_s", "first_encode_s", "next_encode_s", "new_prompt_s", "rss_peak_gb"):
        assert min(base[key], whole[key]) > 0
    assert found["ratios"]["base"]["best_encode_s"] == pytest.approx(whole["best_encode_s"] / base["best_encode_s"])
    assert found["pipeline"]["base offload"]["next_image_s"] > 0


def test_precision_ranks_the_formats_and_finds_both_implementations_equal(quick: Quick) -> None:
    (rows,) = quick("precision")["rows"].values()
    assert rows["transformers, fp32"]["max_abs"] < 1e-4
    assert rows["fp32"]["max_abs"] == 0
    error = {name: row["relative_error"] for name, row in rows.items()}
    assert 0 < error["fp16"] < error["bf16"] < error["fp8_e4m3fn"] < 1
    assert rows["fp8_e4m3fn"]["mb"] == pytest.approx(rows["fp32"]["mb"] / 4, rel=0.01)


def test_start_measures_what_the_pack_adds(quick: Quick) -> None:
    found = quick("start")
    assert 0 < found["start"]["pack_s"] < found["start"]["comfyui_s"]
    assert found["start"]["modules"] > 10


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return result["cases"]["tiny"]["weights"]["fp32"]["rows"]


def test_both_orders_give_the_same_losses(result):
    for row in rows_of(result):
        losses = row["ours"]["losses"]
        assert len(losses) == 2 and min(losses) > 0
        assert row["authors"]["losses"] == losses


def test_rows_hold_rates_ratios_and_shares_with_and_without_checkpointing(result):
    rows = rows_of(result)
    assert [(row["checkpointing"], row["batch"]) for row in rows] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    for row in rows:
        assert row.keys() >= JUDGED | {"encode_s", "ours", "authors"}
        assert row["ours"].keys() >= RATES and row["authors"].keys() >= RATES
        assert row["ours"]["samples_per_s"] == pytest.approx(row["batch"] * row["ours"]["steps_per_s"])
        assert row["ratio"] == pytest.approx(row["authors"]["step_s"] / row["ours"]["step_s"])
    assert [row["sample_cost"] for row in rows if row["batch"] == 1] == [1, 1]


def test_the_result_says_where_it_was_measured_and_what_the_real_sizes_would_share(result):
    assert result["machine"]["torch_threads"] == 1
    shares = result["real_teacher_share"]
    assert 0.01 < shares["77"] < shares["256"] < shares["512"] < 0.1
    assert 3 < result["cases"]["tiny"]["checkpointed_forwards"] < 4
