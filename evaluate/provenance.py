"""Where numbers come from: commit and sources of the pack, the machine, versions of the software, the files of weights."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
import torch

from ..runtime.accelerator import accelerator_type, device_name

ROOT = Path(__file__).resolve().parent.parent
# The rooms whose code decides a number.
ROOMS = ("config", "diffusion", "encoder", "evaluate", "families", "prompts", "runtime", "students", "train", "world")
# ComfyUI's flags that decide how numbers are computed; others only move weights between devices.
DECISIVE_FLAG = re.compile("fp(8|16|32|64)|bf16|attention|fast|channels_last|deterministic|upcast|cpu|directml")
CPU_NAME = re.compile(r"model name\s*:\s*(.+)")
# So many slices of this size are read of a file, evenly spread: all of a small file, 16 MB of a large one.
SLICES, SLICE_BYTES = 256, 1 << 16


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's size and of slices of it, in hexadecimal digits: of all of a file up to 16 MB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    small = size <= SLICES * SLICE_BYTES
    places = range(0, size, SLICE_BYTES) if small else [number * (size - SLICE_BYTES) // (SLICES - 1) for number in range(SLICES)]
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(SLICE_BYTES))
    return digest.hexdigest()


def commit_of(root: Path = ROOT) -> str | None:
    """The commit that is checked out in `root`, the last of git's log of HEAD; None outside a repository (an installed pack)."""
    git = root / ".git"
    if git.is_file():  # a worktree: the file names its folder
        git = root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    log = git / "logs" / "HEAD"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines[-1].split()[1] if lines else None


@functools.cache
def sources_sha256(root: Path = ROOT) -> str:
    """A digest of the pack's own Python sources: equal sources, equal digest, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """Processor, memory and GPU."""
    kind = accelerator_type()
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": kind and device_name(kind),
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """Versions of Python, torch and ComfyUI, which must be importable."""
    import comfyui_version

    return {"python": platform.python_version(), "torch": torch.__version__, "comfyui": comfyui_version.__version__}


def computed_with() -> dict[str, str]:
    """What decides an image's last bits besides models, prompts and seeds: device, versions, and flags of ComfyUI, which must run."""
    import comfy.cli_args
    import comfy.model_management

    parser, given = comfy.cli_args.parser, vars(comfy.cli_args.args)
    chosen = {name: value for name, value in given.items() if value and DECISIVE_FLAG.search(name) and value != parser.get_default(name)}
    flags = [f"{name}={sorted(map(str, value)) if isinstance(value, (list, set)) else value}" for name, value in sorted(chosen.items())]
    found = versions()
    return {
        "device": comfy.model_management.get_torch_device().type,
        "host": f"ComfyUI {found['comfyui']}, torch {found['torch']}",
        "flags of ComfyUI": " ".join(flags) or "none",
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    found = CPU_NAME.search(info.read_text(encoding="utf-8", errors="replace")) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
