"""The repository in folders of other names: pytest collects its tests, and the pack imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_SOURCES = shutil.ignore_patterns(".git", ".venv", ".dev", "demo-output", "__pycache__")


def pytest_in(folder: Path, *arguments: str) -> str:
    """Run pytest in a folder without the environment variables of this run; returns its output."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "COMFYUI"))}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=folder, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("name", ["Distilled T5 (copy)", "distilled-t5", "distilled.t5-main"])
def test_the_unit_tests_run_in_a_folder_of_any_name_without_comfyui(name, tmp_path):
    copy = Path(shutil.copytree(ROOT, tmp_path / name, ignore=NOT_SOURCES))
    said = pytest_in(copy, "tests/unit/test_layout.py", "tests/unit/test_imports.py")
    assert " passed" in said
    assert "skipped" not in said
