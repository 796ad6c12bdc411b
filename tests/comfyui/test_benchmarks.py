"""Every benchmark runs at small sizes and writes its numbers; what the GPU's measures also runs on the practice accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.benchmarks import gpu
from distilled_t5.benchmarks.support.measuring import RESULT
from distilled_t5.devtools.comfyui.server import link_folder

pytestmark = pytest.mark.full

Quick = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def environment(comfyui_path: Path, pack_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a benchmark's process."""
    folder = tmp_path_factory.mktemp("python")
    link_folder(folder / "distilled_t5", pack_root)
    return {**os.environ, "PYTHONPATH": str(folder), "COMFYUI_PATH": str(comfyui_path)}


@pytest.fixture(scope="module")
def quick(environment: dict[str, str], pack_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Runs a benchmark with --quick; returns what it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")

    def run(name: str, *more: str) -> dict[str, Any]:
        command = [sys.executable, str(pack_root / "benchmarks" / f"{name}.py"), "--quick", "--out", str(folder / name), *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (written,) = (folder / name).iterdir()
        assert written.name in done.stdout.splitlines()[-1]
        found = json.loads(written.read_text(encoding="utf-8"))
        assert {"commit", "cpu", "torch", "comfyui", "torch_threads", "load_average_at_start"} <= found["machine"].keys()
        return found

    return run


def test_every_benchmark_is_tried_here(pack_root: Path) -> None:
    assert {path.stem for path in (pack_root / "benchmarks").glob("*.py")} == {"encode", "gpu", "precision", "start"}


def test_encode_measures_load_encode_and_memory(quick: Quick) -> None:
    found = quick("encode")
    base, whole = found["encoders"]["base"], found["encoders"]["xxl-bf16"]
    assert base["t5_weights_gb"] == pytest.approx(0.259, abs=0.001)
    assert base["tokens"] == whole["tokens"] == 256
    for key in ("load_cold_s", "load_warm_s", "first_encode_s", "next_encode_s", "new_prompt_s", "rss_peak_gb"):
        assert min(base[key], whole[key]) > 0
    assert found["ratios"]["base"]["best_encode_s"] == pytest.approx(whole["best_encode_s"] / base["best_encode_s"])


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


def test_gpu_measures_every_part_at_small_sizes(quick: Quick) -> None:
    found = quick("gpu", "--minutes", "60")
    assert not found["left_out"] and not found["failed"]
    assert set(found["parts"]) == {part.name for part in gpu.parts(gpu.EVERY_FAMILY)} == set(found["seconds"])
    assert found["compared"]["two_streams_change_nothing"] is True
    assert 0 < found["compared"]["fp16_losses_differ_by"] < 0.1
    assert all(row["same_bits"] for row in found["parts"]["resume to the bit"])
    for name in gpu.EVERY_FAMILY:
        [row] = found["parts"][name]
        assert row["share_of_product"] > 0 and row["skipped"] == 0


def test_every_kind_of_part_runs_on_the_practice_accelerator(pack_root: Path, environment: dict[str, str], tmp_path: Path) -> None:
    wanted = {"resume to the bit", "encoders", "pipeline", "pipeline, weights in RAM, one stream", "flux-dev-paper", "flux-dev-paper, fp16"}
    parts = [(part.name, part.measure, part.arguments) for part in gpu.parts(gpu.EVERY_FAMILY) if part.name in wanted]
    task = {"flags": gpu.ONE_STREAM, "folder": str(tmp_path), "full": False, "device": {"quick": True, "note": ""}, "parts": parts}
    accelerator = pack_root / "tests" / "support" / "practice_accelerator_command.py"
    command = [sys.executable, str(accelerator), str(pack_root / "benchmarks" / "gpu.py"), "--task", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    device, *results = [json.loads(line.removeprefix(RESULT)) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    assert (device["device"], device["device_name"]) == ("npu:0", "practice accelerator")
    assert {result["part"] for result in results if "row" in result} == wanted
    rows = [result["row"] for result in results if "row" in result]
    assert all(row.get("device_peak_gb", 1) > 0 and row.get("same_bits", True) for row in rows)
