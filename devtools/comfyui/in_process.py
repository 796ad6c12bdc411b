"""A ComfyUI in this process, for development commands that need its Python and no server."""

from __future__ import annotations

import os
from pathlib import Path

from ...runtime import comfyui

ROOT = Path(__file__).resolve().parents[2]


def start_comfyui(*flags: str) -> Path:
    """Make `comfy` of COMFYUI_PATH, else of the developer's copy, importable with these command-line flags; returns its folder.

    Raises ValueError if there is no ComfyUI.
    """
    folder = comfyui.find_comfyui(os.environ.get("COMFYUI_PATH") or str(ROOT / ".dev" / "comfyui"))
    comfyui.start_comfyui(folder, flags)
    return folder
