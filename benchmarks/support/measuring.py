"""What the benchmarks share: options, encoder files of real sizes, timing, memory, facts about the machine, tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from ...devtools.comfyui.in_process import ROOT
from ...encoder.stream import write_stream
from ...evaluate import provenance
from ...students.t5.layout import Shape, StudentLayout


def command_line(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark, since `dev.py bench` passes its own to all of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition, to see that it runs")
    parser.add_argument("--gpu", action="store_true", help="measure on the first CUDA device instead of the CPU")
    parser.add_argument("--note", default="", help="a remark for the JSON, such as 'shared machine'")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results; with --quick, .dev/benchmarks)")
    return parser


def options_or_task(description: str, perform: Callable[[dict[str, Any]], Any]) -> argparse.Namespace | None:
    """The options of a benchmark that measures in fresh processes (`in_fresh_process`); None in such a process, after its task."""
    parser = command_line(description)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.task:
        return options
    print("\n" + json.dumps(perform(options.task)))
    return None


def in_fresh_process(script: str, task: dict[str, Any]) -> Any:
    """The result of `perform(task)` in a new process of a benchmark. Raises RuntimeError if it fails."""
    command = [sys.executable, str(Path(script).resolve()), "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Measuring {task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def scratch_folder(needed_gb: float) -> Iterator[Path]:
    """A folder for large files, removed at the end, also on SIGTERM. Raises ValueError if the disk has too little space."""
    parent = ROOT / ".dev"
    parent.mkdir(exist_ok=True)
    free_gb = shutil.disk_usage(parent).free / 1e9
    if free_gb < needed_gb:
        raise ValueError(
            f"The disk of {parent} has {free_gb:.0f} GB free: the benchmark needs {needed_gb:.0f} GB.\nWhat to do: free space."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=parent, prefix="benchmark-") as folder:
        yield Path(folder)


def initial_weight(layout: StudentLayout, generator: torch.Generator) -> Callable[[str, Shape], Tensor]:
    """A function that draws a float32 tensor by its published name with T5's initialisation.

    Deviations as in transformers' T5PreTrainedModel; the projection as torch.nn.Linear.
    """
    width, inner = layout.d_model, layout.num_heads * layout.d_kv
    deviations = {
        "shared": 1.0,
        "relative_attention_bias": width**-0.5,
        "q": (width * layout.d_kv) ** -0.5,
        **dict.fromkeys(("k", "v", "wi", "wi_0", "wi_1"), width**-0.5),
        "o": inner**-0.5,
        "wo": layout.d_ff**-0.5,
    }

    def draw(name: str, shape: Shape) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        deviation = deviations.get(name.split(".")[-2], (3 * shape[-1]) ** -0.5)
        return torch.empty(shape).normal_(0.0, deviation, generator=generator)

    return draw


def write_streamed(path: Path, shapes: dict[str, Shape], dtype: torch.dtype, draw: Callable[[str, Shape], Tensor]) -> None:
    """Write a safetensors file one tensor at a time, so that it may be larger than the memory."""
    write_stream(path, {name: (dtype, shape) for name, shape in shapes.items()}, lambda name: draw(name, shapes[name]).to(dtype))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of wall time, and of processor time of all threads, which on one thread hardly depends on other load."""

    wall_s: float
    cpu_s: float


def timed(action: Callable[[], Any], gpu: bool) -> tuple[Timing, Any]:
    """The time of an action, including the GPU's work, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    if gpu:
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu), result


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


def save_result(result: dict[str, Any], kind: str, options: argparse.Namespace) -> Path:
    """Write a result as `<date>-<kind>.json`, with a number if that exists; returns the path."""
    folder = options.out or (ROOT / ".dev" / "benchmarks" if options.quick else ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result['machine']['date'][:10]}-{kind}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
