"""`dev.py miniature` as a whole: a trial of two steps from students to tables, what is kept, and its stop."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from distilled_t5.devtools.commands import ROOT
from distilled_t5.devtools.docs.miniature_tables import PLOT, TABLES
from distilled_t5.devtools.miniature import (
    SHIPPED_STUDENTS,
    Run,
    check_recipe,
    in_bfloat16,
    ship,
    student_file,
    students,
    train_students,
    trial_settings,
)
from distilled_t5.devtools.miniature_results import MIDDLE, RESULTS, SD3_STUDENT, TEACHER
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.tests.support.trainer import BOUND_S, interrupt
from distilled_t5.tests.support.trainer import start as start_process
from distilled_t5.world.scenes import NEW_IN_TASK

pytestmark = [pytest.mark.full, pytest.mark.skipif(os.name == "nt", reason="Windows has none of these signals and links")]

NAME = "miniature_student_fortieth"


def start(comfyui: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    """The command with its work in a folder, as dev.py starts it."""
    (folder / "python").mkdir(exist_ok=True)
    if not (folder / "python" / "distilled_t5").is_symlink():
        (folder / "python" / "distilled_t5").symlink_to(ROOT)
    command = ["-m", "distilled_t5.devtools.miniature", "--comfyui", str(comfyui), "--work", str(folder / "work"), *options]
    return start_process(command, folder, PYTHONPATH=str(folder / "python"), OMP_NUM_THREADS="1")


def kept_files() -> dict[Path, str]:
    """What the repository keeps of the miniature, by digest."""
    paths = [*SHIPPED.rglob("*.safetensors"), RESULTS, PLOT, *TABLES]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_trial_trains_measures_and_touches_nothing_that_is_kept(comfyui_path, tmp_path):
    before, options = kept_files(), ("--steps", "2", "--count", "2", "--only", NAME)
    process = start(comfyui_path, tmp_path, *options)
    said = process.communicate(timeout=BOUND_S)[0]
    assert process.returncode == 0, said
    found = json.loads((tmp_path / "work" / "results.json").read_text(encoding="utf-8"))
    by_name = {one["name"]: one for one in found["encoders"]}
    assert set(by_name) == {TEACHER, *SHIPPED_STUDENTS, "untrained"} - {SD3_STUDENT}
    assert [one["name"] for one in found["sd3"]["encoders"]] == [TEACHER, SD3_STUDENT, MIDDLE]
    assert by_name[NAME]["steps"] == 4, "the trial's own, two steps of each stage, not the shipped one"
    assert set(by_name[TEACHER]["tasks"]) == set(NEW_IN_TASK) == set(by_name[NAME]["tasks"])
    assert {task["n"] for task in by_name[TEACHER]["tasks"].values()} == {2}
    assert by_name[MIDDLE]["share"]["value"] > by_name["untrained"]["share"]["value"] == 0
    assert by_name[MIDDLE]["bytes"] == (SHIPPED / "text_encoders" / f"{MIDDLE}.safetensors").stat().st_size
    assert f"| {TEACHER}" in said
    trained = student_file(tmp_path / "work", NAME)
    age = trained.stat().st_mtime_ns
    assert kept_files() == before
    train_students([Run(NAME, "miniature-fortieth", trial_settings(2))], comfyui_path, tmp_path / "work")
    assert trained.stat().st_mtime_ns == age, "a student that is there is kept"
    with pytest.raises(RuntimeError, match=r"another recipe(.|\n)*What to do: delete it"):
        check_recipe(Run(NAME, "miniature-fortieth"), trained)


def test_ctrl_c_ends_it_with_its_students_saved(comfyui_path, tmp_path):
    process = start(comfyui_path, tmp_path, "--steps", "100000", "--only", NAME)
    metrics, deadline = tmp_path / "work" / "runs" / NAME / "metrics.jsonl", time.monotonic() + BOUND_S
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    interrupt(process)
    assert list((metrics.parent / "checkpoints").glob("step-*/student.safetensors")), "it saved before it ended"


def test_what_is_shipped_is_what_was_trained_and_an_equal_file_is_not_written_again(tmp_path):
    path = SHIPPED / "text_encoders" / f"{MIDDLE}.safetensors"
    trained = student_file(tmp_path, MIDDLE)
    trained.parent.mkdir(parents=True)
    trained.write_bytes(path.read_bytes())
    age = path.stat().st_mtime_ns
    files = students(tmp_path)
    assert files[MIDDLE] == tmp_path / "bfloat16" / f"{MIDDLE}.safetensors"
    assert {*files} == {*SHIPPED_STUDENTS, "untrained"}
    ship(files.values())
    assert path.stat().st_mtime_ns == age
    made = files[MIDDLE].stat().st_mtime_ns
    assert in_bfloat16(trained, files[MIDDLE]).stat().st_mtime_ns == made
