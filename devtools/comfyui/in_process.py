"""A ComfyUI in this process, for development commands that need its Python and no server."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ...runtime import comfyui

ROOT = Path(__file__).resolve().parents[2]


def start_comfyui(gpu: bool = False, **flags: bool) -> Path:
    """Make `comfy` of COMFYUI_PATH, else of the developer's copy, importable with these command-line flags; returns its folder.

    Raises ValueError if there is no ComfyUI, or if torch finds no GPU to use.
    """
    if gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a CUDA device, but torch finds none: leave --gpu out, or install a driver and torch's CUDA build.")
    folder = comfyui.find_comfyui(os.environ.get("COMFYUI_PATH") or str(ROOT / ".dev" / "comfyui"))
    # ComfyUI's own default on NVIDIA, which the trainer cannot use.
    given = ["--async-offload" if gpu else "--cpu", *(f"--{name.replace('_', '-')}" for name, is_on in flags.items() if is_on)]
    comfyui.start_comfyui(folder, given)
    return folder
