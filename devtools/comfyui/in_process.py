"""ComfyUI in this process, for development commands that need its Python modules and no server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def start_comfyui(gpu: bool = False, **flags: bool) -> Path:
    """Make `comfy` importable, with these command-line flags of ComfyUI set; returns its folder.

    Raises ValueError if COMFYUI_PATH is not a ComfyUI, or if `gpu` is set and torch finds no GPU.
    """
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".dev" / "comfyui").resolve()
    if not (path / "main.py").is_file():
        raise ValueError(f"{path} is not a ComfyUI: run `python dev.py test` once, or set COMFYUI_PATH to a folder with ComfyUI's main.py.")
    if gpu and not torch.cuda.is_available():
        raise ValueError("--gpu needs a CUDA device and torch finds none: leave out --gpu, or install a driver and torch's CUDA build.")
    sys.path.insert(0, str(path))
    from comfy.cli_args import args

    args.cpu = not gpu
    for flag, value in flags.items():
        setattr(args, flag, value)
    return path
