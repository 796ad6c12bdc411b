"""The pack as a copy in a folder of another name: its tests run there, and after its removal nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.models.random_models import link_into

NOT_SOURCES = shutil.ignore_patterns(".git", ".venv", ".dev", "demo-output", "__pycache__")
# Written by ComfyUI itself: settings, database, log, thumbnails, images.
OF_COMFYUI = ("user/", "temp/", "output/", "server.log")


@pytest.fixture
def copy(pack_root: Path, tmp_path: Path) -> Path:
    """A copy of the sources of the pack, in a folder with a dash and a space in its name."""
    return Path(shutil.copytree(pack_root, tmp_path / "copies" / "my distilled-t5", ignore=NOT_SOURCES))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.full
def test_the_comfyui_tests_run_in_a_folder_of_another_name(copy: Path, comfyui_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    command = [sys.executable, "-m", "pytest", "-q", "tests/comfyui/test_bad_input.py", "-k", "names_that_can_be_saved or vanished"]
    done = subprocess.run(
        command, cwd=copy, env=environment | {"COMFYUI_PATH": str(comfyui_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.full
def test_a_pack_that_was_used_and_removed_leaves_nothing(copy: Path, comfyui_path: Path, stand_ins: Path, tmp_path: Path) -> None:
    base, sources = tmp_path / "base", files_below(copy)
    link_into(stand_ins, base)
    before = files_below(base)
    prompt = {
        "1": {
            "class_type": "DistilledT5Loader",
            "inputs": {"clip_name1": "clip_l.safetensors", "clip_name2": "distilled_t5_base.safetensors", "type": "flux"},
            "_meta": {"title": "Load"},
        },
        "2": {
            "class_type": "DistilledT5TextEncode",
            "inputs": {"clip": ["1", 0], "text": "a cat", "guidance": 3.5},
            "_meta": {"title": "Encode"},
        },
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 1]}, "_meta": {"title": "Count"}},
    }
    with ComfyServer(comfyui_path, base, copy) as server:
        assert "of 256" in "".join(server.run(prompt)["outputs"]["3"]["text"])
    assert files_below(copy) == sources, "the pack wrote into its own folder"
    (base / "custom_nodes" / copy.name).unlink()
    shutil.rmtree(copy)
    assert {name for name in files_below(base) if not name.startswith(OF_COMFYUI)} == before
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with ComfyServer(comfyui_path, base, nothing) as server:
        assert "DistilledT5Loader" not in server.object_info()
        assert "distilled" not in server.log().lower().replace(str(base).lower(), "")
