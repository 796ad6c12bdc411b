"""`dev.py lab` as a whole: a trial of two arms from students to tables, what is kept, and its stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distilled_t5.devtools.commands import ROOT
from distilled_t5.devtools.docs.lab_tables import TABLES
from distilled_t5.devtools.lab_arms import Lab
from distilled_t5.devtools.lab_results import RESULTS
from distilled_t5.tests.support.trainer import BOUND_S, interrupt
from distilled_t5.world.pictures import TASKS

pytestmark = [pytest.mark.full, pytest.mark.skipif(os.name == "nt", reason="Windows has none of these signals and links")]

ARMS = [arm.name for arm in Lab.read("flux").arms[:2]]


def start(comfyui: Path, folder: Path) -> subprocess.Popen[str]:
    """The command's trial with its runs in a folder, as dev.py starts it."""
    (folder / "python").mkdir(exist_ok=True)
    if not (folder / "python" / "distilled_t5").is_symlink():
        (folder / "python" / "distilled_t5").symlink_to(ROOT)
    options = ["--comfyui", str(comfyui), "--quick", "--runs", str(folder / "lab")]
    env = {**os.environ, "PYTHONPATH": str(folder / "python"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distilled_t5.devtools.lab", *options]
    return subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kept_files() -> dict[Path, bytes]:
    """What the repository keeps of the lab."""
    return {path: path.read_bytes() for path in [*TABLES, RESULTS] if path.is_file()}


def test_a_stopped_trial_continues_to_its_tables_and_touches_nothing_that_is_kept(comfyui_path: Path, tmp_path: Path) -> None:
    before, runs = kept_files(), tmp_path / "lab" / "flux" / "runs"
    process, deadline = start(comfyui_path, tmp_path), time.monotonic() + BOUND_S
    while not [*runs.glob("*/runs/train/recipe.toml")]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    interrupt(process)

    process = start(comfyui_path, tmp_path)
    said = process.communicate(timeout=BOUND_S)[0]
    assert process.returncode == 0, said
    found = json.loads((tmp_path / "lab" / "flux" / "results.json").read_text(encoding="utf-8"))["flux"]
    assert [arm["name"] for arm in found["arms"]] == ARMS
    assert [[seed["seed"] for seed in arm["seeds"]] for arm in found["arms"]] == [[0], [0]]
    assert {task: one["n"] for task, one in found["teacher"].items()} == dict.fromkeys(TASKS, 2)
    assert found["arms"][0]["of_base"] == 1.0
    assert "| the teacher" in said
    ages = {path: path.stat().st_mtime_ns for path in runs.glob("*/evaluation/results.json")}
    assert len(ages) == 2

    process = start(comfyui_path, tmp_path)
    assert process.communicate(timeout=BOUND_S)[0].count("embedding-velocity, seed") == 0
    assert {path: path.stat().st_mtime_ns for path in ages} == ages, "what is done is left alone"
    assert kept_files() == before
