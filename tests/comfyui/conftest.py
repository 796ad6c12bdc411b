"""A real ComfyUI for this tier: in this process on sys.path, and as a server."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
WORK = tempfile.TemporaryDirectory(prefix="distilled-t5-host-")


def find_comfyui() -> Path:
    """The ComfyUI under test: COMFYUI_PATH (dev.py sets it), else the one that dev.py unpacked."""
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui").resolve()
    if not (path / "main.py").is_file():
        raise pytest.UsageError(
            f"These tests need a ComfyUI, and {path} is none: run `python dev.py test`, or set COMFYUI_PATH to its folder."
        )
    return path


def prepare_comfyui(path: Path) -> None:
    """Make `comfy` importable, on the CPU where there is no GPU, with its folders in a place of their own."""
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.base_directory = WORK.name
    # As main.py does: older hosts' `nodes` puts comfy/ first on sys.path, whose utils.py would then hide the package `utils`.
    import utils.extra_config  # noqa: F401 (kept in sys.modules; it brings folder_paths, which reads the arguments once)


COMFYUI = find_comfyui()
prepare_comfyui(COMFYUI)


def pytest_unconfigure() -> None:
    """Remove the host's scratch folders."""
    WORK.cleanup()


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The folder of the ComfyUI under test."""
    return COMFYUI


@pytest.fixture(scope="session")
def stand_ins() -> Path:
    """A folder of small stand-in models, laid out as ComfyUI's `models`; made once and kept below .dev."""
    from distilled_t5.devtools.models.random_models import ensure_all

    folder = ROOT / ".dev" / "stand-ins"
    ensure_all(folder)
    return folder


@pytest.fixture(scope="session")
def server(comfyui_path: Path, pack_root: Path, tmp_path_factory: pytest.TempPathFactory, stand_ins: Path) -> Iterator[object]:
    """A running ComfyUI with the pack installed as a user would; `.url` is its address."""
    from distilled_t5.devtools.comfyui.server import ComfyServer

    with ComfyServer(comfyui=comfyui_path, base=tmp_path_factory.mktemp("server"), pack=pack_root) as running:
        yield running
