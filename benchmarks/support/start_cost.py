"""The pack's share of ComfyUI's start, printed as JSON: `python -m distilled_t5.benchmarks.support.start_cost COMFYUI PACK BASE`.

ComfyUI's own nodes are imported first, as its main.py does; what comes after that is the pack's.
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
    """Import the pack in a fresh ComfyUI: `host_s` and `pack_s` seconds, the pack's node ids, and new modules with the files they are of.

    `touched` lists network, processes and written files; `routes` the pages that the server got; `cuda_started` whether a GPU was.
    RuntimeError with the process's last lines if ComfyUI does not take the pack.
    """
    command = [sys.executable, str(Path(__file__).resolve()), str(comfyui), str(pack), str(base)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=comfyui)
    if done.returncode:
        raise RuntimeError(f"the pack could not be imported:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


async def import_pack(comfyui: Path, pack: Path, base: Path) -> dict[str, Any]:
    """Do in this process what `measured` reports."""
    start = time.perf_counter()
    sys.path.insert(0, str(comfyui))
    arguments: Any = importlib.import_module("comfy.cli_args").args
    arguments.cpu, arguments.base_directory = True, str(base)
    importlib.import_module("utils.extra_config")
    nodes: Any = importlib.import_module("nodes")
    server: Any = importlib.import_module("server").PromptServer(asyncio.get_running_loop())
    await nodes.init_builtin_extra_nodes()
    host_s, modules, known = time.perf_counter() - start, set(sys.modules), set(nodes.NODE_CLASS_MAPPINGS)
    routes, touched = set(map(str, server.routes)), record_touches()
    start = time.perf_counter()
    taken = await nodes.load_custom_node(str(pack))
    pack_s, touched = time.perf_counter() - start, list(touched)
    if not taken:
        raise RuntimeError(f"ComfyUI did not take {pack}")
    new = {name: getattr(sys.modules[name], "__file__", None) for name in sorted(set(sys.modules) - modules)}
    found = {"host_s": host_s, "pack_s": pack_s, "nodes": sorted(set(nodes.NODE_CLASS_MAPPINGS) - known), "modules": new}
    cuda_started = importlib.import_module("torch").cuda.is_initialized()
    return found | {"touched": touched, "routes": sorted(set(map(str, server.routes)) - routes), "cuda_started": cuda_started}


def record_touches() -> list[str]:
    """A list that from now on gets every use of the network, every started process and every written file of this process."""
    touched: list[str] = []

    def hear(event: str, details: tuple[Any, ...]) -> None:
        if event.startswith(OUTSIDE) or (event == "open" and is_written(*details)):
            touched.append(f"{event} {details}")

    sys.addaudithook(hear)
    return touched


def is_written(path: Any, mode: str | None, flags: int) -> bool:
    """Whether a file is opened to be changed; Python's own cache of compiled modules does not count."""
    changes = set("wax+") & set(mode) if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return bool(changes) and "__pycache__" not in str(path)


if __name__ == "__main__":
    # This file's own folder must not hide anything of the host's.
    sys.path.pop(0)
    print(json.dumps(asyncio.run(import_pack(*map(Path, sys.argv[1:4])))))
