"""The pack's share of ComfyUI's start, printed as JSON: `python start_cost.py COMFYUI PACK BASE`.

ComfyUI's own nodes are imported first, as in its main.py; what comes after them belongs to the pack.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OUTSIDE = ("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")


def measured(comfyui: Path, pack: Path, base: Path) -> dict[str, Any]:
    """Import the pack in a fresh ComfyUI: `comfyui_s` and `pack_s` seconds, the pack's node ids, new modules with their files.

    `touched` lists network use, processes and written files; `routes` the new pages of the server; `cuda_started` is whether CUDA was
    initialised. Raises RuntimeError with the end of the log if ComfyUI does not load the pack.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(comfyui), str(pack), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=comfyui)
    if done.returncode:
        raise RuntimeError(f"The pack could not be imported:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


async def import_pack(comfyui: Path, pack: Path, base: Path) -> dict[str, Any]:
    """The numbers of `measured`, in this process."""
    start = time.perf_counter()
    sys.path.insert(0, str(comfyui))
    arguments: Any = importlib.import_module("comfy.cli_args").args
    arguments.cpu, arguments.base_directory = True, str(base)
    importlib.import_module("utils.extra_config")
    nodes: Any = importlib.import_module("nodes")
    server: Any = importlib.import_module("server").PromptServer(asyncio.get_running_loop())
    await nodes.init_builtin_extra_nodes()
    comfyui_s, modules, known = time.perf_counter() - start, set(sys.modules), set(nodes.NODE_CLASS_MAPPINGS)
    routes, touched = set(map(str, server.routes)), record_touches()
    start = time.perf_counter()
    loaded = await nodes.load_custom_node(str(pack))
    pack_s, touched = time.perf_counter() - start, list(touched)
    if not loaded:
        raise RuntimeError(f"ComfyUI did not load {pack}")
    return {
        "comfyui_s": comfyui_s,
        "pack_s": pack_s,
        "nodes": sorted(set(nodes.NODE_CLASS_MAPPINGS) - known),
        "modules": {name: getattr(sys.modules[name], "__file__", None) for name in sorted(set(sys.modules) - modules)},
        "touched": touched,
        "routes": sorted(set(map(str, server.routes)) - routes),
        "cuda_started": importlib.import_module("torch").cuda.is_initialized(),
    }


def record_touches() -> list[str]:
    """A list to which every later use of the network, started process and written file of this process is appended."""
    touched: list[str] = []

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event.startswith(OUTSIDE) or (event == "open" and is_written(*details)):
            touched.append(f"{event} {details}")

    sys.addaudithook(hook)
    return touched


def is_written(path: Any, mode: str | None, flags: int) -> bool:
    """Whether a file is opened for writing; Python's cache of compiled modules does not count."""
    writes = set("wax+") & set(mode) if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return bool(writes) and "__pycache__" not in str(path)


if __name__ == "__main__":
    # The folder of this file must not hide modules of ComfyUI.
    sys.path.pop(0)
    print(json.dumps(asyncio.run(import_pack(*map(Path, sys.argv[1:4])))))
