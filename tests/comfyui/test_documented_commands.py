"""The README's commands from a clone to a student and an evaluation, run as they are printed, with fewer steps and images."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FEWER_STEPS = ["stage.0.steps=2", "stage.1.steps=2", "optimizer.warmup_steps=1", "validation.prompts=4", "sampling.steps=1"]
FEWER_IMAGES = ["sampling.steps=2", *(f"task.{number}.prompts.limit=2" for number in range(7))]
FEWER_IMAGES += ["embedding.prompts=7", "velocity_gap.prompts=7", "latent_distance.prompts=7", "cost.repeats=2"]


def printed(readme: str, program: str) -> list[str]:
    """The arguments of the README's only command for a clone that starts `program`."""
    [line] = re.findall(rf"^\.venv/bin/python ({program} .*)$", readme, re.MULTILINE)
    return shlex.split(line)


def run(arguments: list[str], settings: list[str], pack: Path, comfyui: Path, base: Path) -> str:
    sets = [part for setting in settings for part in ("--set", setting)]
    ours = [str(pack / arguments[0]), *arguments[1:], "--comfyui", str(comfyui), *sets, "--", "--base-directory", str(base), "--cpu"]
    done = subprocess.run([sys.executable, *ours], cwd=base, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_the_readme_leads_from_a_clone_to_a_student_and_to_a_page(pack_root: Path, comfyui_path: Path, tmp_path: Path) -> None:
    readme = (pack_root / "README.md").read_text(encoding="utf-8")
    run(printed(readme, "train"), FEWER_STEPS, pack_root, comfyui_path, tmp_path)
    assert (tmp_path / "models" / "text_encoders" / "my_student.safetensors").is_file()
    run(printed(readme, "evaluate"), FEWER_IMAGES, pack_root, comfyui_path, tmp_path)
    assert "my_student" in (tmp_path / "evaluations" / "miniature" / "page.html").read_text(encoding="utf-8")
    for promised in re.findall(r"`(runs/[\w-]+|evaluations/[\w./-]+)`", readme):
        assert (tmp_path / promised).exists(), promised
