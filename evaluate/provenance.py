"""Where numbers come from: commit and sources of the pack, the machine, the versions of what computed."""

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

ROOT = Path(__file__).resolve().parent.parent
COMMIT = re.compile(r"[0-9a-f]{40}")
# ComfyUI's flags that decide how numbers are computed; others only move weights about.
DECISIVE_FLAG = re.compile("fp(8|16|32|64)|bf16|attention|fast|channels_last|deterministic|upcast|cpu|directml")
CPU_NAME = re.compile(r"model name\s*:\s*(.+)")


def commit_of(root: Path = ROOT) -> str | None:
    """The commit that is checked out in `root`, read off git's own files; None where there is no repository (an installed pack)."""
    git = root / ".git"
    if git.is_file():  # a worktree: the file names its folder
        git = (root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
    if not (git / "HEAD").is_file():
        return None
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    name = head.removeprefix("ref: ")
    if name == head:
        return head
    # Branches of a worktree lie in the repository that it belongs to.
    common = git / "commondir"
    repository = (git / common.read_text(encoding="utf-8").strip()).resolve() if common.is_file() else git
    if (repository / name).is_file():
        return (repository / name).read_text(encoding="utf-8").strip()
    packed = repository / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}") and COMMIT.match(line)), None)


@functools.cache
def sources_sha256(root: Path = ROOT) -> str:
    """A digest of the pack's own Python sources: equal sources, equal digest, committed or not."""
    digest = hashlib.sha256()
    for folder in ("encoder", "evaluate", "miniature", "train"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """Processor, memory and GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "system": platform.platform(terse=True),
    }


def versions() -> dict[str, str]:
    """What computed: Python, torch, ComfyUI, which must be importable."""
    import comfyui_version

    return {"python": platform.python_version(), "torch": torch.__version__, "comfyui": comfyui_version.__version__}


def computed_with() -> dict[str, str]:
    """What decides a picture's last bits besides models, prompts and seeds: kind of device, versions, flags of ComfyUI, which must run."""
    import comfy.cli_args
    import comfy.model_management

    parser, given = comfy.cli_args.parser, vars(comfy.cli_args.args)
    chosen = {name: value for name, value in given.items() if value and DECISIVE_FLAG.search(name) and value != parser.get_default(name)}
    told = [f"{name}={sorted(map(str, value)) if isinstance(value, (list, set)) else value}" for name, value in sorted(chosen.items())]
    found = versions()
    return {
        "device": comfy.model_management.get_torch_device().type,
        "host": f"ComfyUI {found['comfyui']}, torch {found['torch']}",
        "flags of ComfyUI": " ".join(told) or "none",
    }


def processor() -> str:
    """The processor as the system calls it."""
    listed = Path("/proc/cpuinfo")
    found = CPU_NAME.search(listed.read_text(encoding="utf-8", errors="replace")) if listed.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
