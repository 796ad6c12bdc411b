"""What the benchmarks share: options, processes, a folder for large files, timing, memory, facts about the machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import torch

from ...devtools.comfyui.in_process import ROOT
from ...evaluate import provenance
from ...runtime.accelerator import counting_module
from ...runtime.disk import replace_file

# Begins a line of a process's output that holds a result.
RESULT = "result: "
# Its process and a random part follow.
SCRATCH = "distilled-t5-benchmark-"


def command_line(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark, since `dev.py bench` passes its own to all of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition, to see that it runs")
    parser.add_argument("--note", default="", help="a remark for the JSON, such as 'shared machine'")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results; with --quick, .dev/benchmarks)")
    return parser


def with_task(parser: argparse.ArgumentParser, perform: Callable[[dict[str, Any]], Iterable[Any]]) -> argparse.Namespace | None:
    """The options of a benchmark that measures in fresh processes (`in_fresh_process`); None in such a process, after its task."""
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.task:
        return options
    for result in perform(options.task):
        print(f"\n{RESULT}{json.dumps(result)}", flush=True)
    return None


def in_fresh_process(script: str, task: dict[str, Any], limit_s: float = threading.TIMEOUT_MAX) -> Iterator[Any]:
    """The results of `perform(task)` in a new process of a benchmark, each as soon as it is there.

    Raises RuntimeError with the end of its log if the process fails, or is ended after `limit_s` seconds.
    """
    command, begin = [sys.executable, str(Path(script).resolve()), "--task", json.dumps(task)], time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log, subprocess.Popen(command, stdout=PIPE, stderr=log, text=True) as process:
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith(RESULT):
                    yield json.loads(line.removeprefix(RESULT))
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
        if status:
            log.seek(0)
            why = f"status {status}" if time.monotonic() - begin < limit_s else f"ended after {limit_s:.0f} s"
            raise RuntimeError(f"Measuring {task} failed ({why}):\n{log.read()[-3000:]}")


@contextlib.contextmanager
def scratch_folder(needed_gb: float, parent: Path = ROOT / ".dev") -> Iterator[Path]:
    """A folder for large files, removed at the end, also on SIGTERM; those of killed processes are removed first.

    Raises ValueError if the disk has too little space.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f"{SCRATCH}*"):
        made_by = re.fullmatch(rf"{SCRATCH}(\d+)-\w+", left.name)
        if made_by and not psutil.pid_exists(int(made_by[1])):
            shutil.rmtree(left)
    free_gb = shutil.disk_usage(parent).free / 1e9
    if free_gb < needed_gb:
        raise ValueError(
            f"The disk of {parent} has {free_gb:.0f} GB free: the benchmark needs {needed_gb:.0f} GB.\nWhat to do: free space."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=parent, prefix=f"{SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of wall time, and of processor time of all threads, which on one thread hardly depends on other load."""

    wall_s: float
    cpu_s: float


def device() -> torch.device:
    """The device that ComfyUI computes on."""
    return importlib.import_module("comfy.model_management").get_torch_device()


def timed(action: Callable[[], Any]) -> tuple[Timing, Any]:
    """The time of an action, including the work of ComfyUI's device, and its result."""
    module = torch.get_device_module(device())
    module.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    module.synchronize()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu), result


def peak_gb() -> float | None:
    """The peak of the memory of tensors on the accelerator since `restart_peak`, GB; None without one that counts."""
    module = counting_module()
    return None if module is None else module.max_memory_allocated() / 1e9


def restart_peak() -> None:
    """Count the peak from now on, after returning unused memory to the device."""
    gc.collect()
    importlib.import_module("comfy.model_management").soft_empty_cache()
    if (module := counting_module()) is not None:
        module.reset_peak_memory_stats()


def evict(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_gb() -> dict[str, float]:
    """Memory of this process in GB: `rss` now, `private` (not backed by a file) now, `peak` rss so far. Linux only."""
    status = Path("/proc/self/status").read_text()
    found = {key: int(value) * 1024 / 1e9 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", status, re.MULTILINE)}
    return {"rss": found["VmRSS"], "private": found["RssAnon"], "peak": found["VmHWM"]}


def machine(note: str) -> dict[str, Any]:
    """Machine, versions, commit and load of a benchmark. ComfyUI must be importable."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **provenance.machine(),
        **provenance.versions(),
        "torch_threads": torch.get_num_threads(),
        "commit": provenance.commit_of(),
        "load_average_at_start": round(psutil.getloadavg()[0], 2),
        "note": note,
    }


def result_path(kind: str, options: argparse.Namespace) -> Path:
    """Where to write a result: `<date>-<kind>.json`, with a number if that exists."""
    folder = options.out or (ROOT / ".dev" / "benchmarks" if options.quick else ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{kind}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


def save_result(result: dict[str, Any], path: Path) -> Path:
    """Write a result as JSON, atomically; returns the path."""
    replace_file(path, (json.dumps(result, indent=2) + "\n").encode())
    return path
