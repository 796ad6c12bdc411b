"""What the benchmarks share: options, encoder files of the real sizes, memory, facts about the machine, tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
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
from ...evaluate.provenance import processor
from ...students.t5.layout import Shape, StudentLayout


def command_line(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes, because `dev.py bench` hands its own to all of them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes and one repetition: does it run at all?")
    parser.add_argument("--gpu", action="store_true", help="measure on the first CUDA device instead of the CPU")
    parser.add_argument("--note", default="", help="a remark for the JSON, such as 'shared machine'")
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: benchmarks/results, with --quick .dev/benchmarks)")
    return parser


def options_or_task(description: str, perform: Callable[[dict[str, Any]], None]) -> argparse.Namespace | None:
    """The options of a benchmark that measures in processes of its own (`in_fresh_process`); None in such a one, after its task is done."""
    parser = command_line(description)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        perform(options.task)
        return None
    return options


@contextlib.contextmanager
def scratch_folder(needed_gb: float) -> Iterator[Path]:
    """A folder for big files that is gone afterwards, also when the process is asked to end. Raises ValueError if its disk is too full."""
    parent = ROOT / ".dev"
    parent.mkdir(exist_ok=True)
    free_gb = shutil.disk_usage(parent).free / 1e9
    if free_gb < needed_gb:
        raise ValueError(f"The benchmark needs {needed_gb:.0f} GB on the disk of {parent}, which has {free_gb:.0f} GB free: make room.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=parent, prefix="bench-") as folder:
        yield Path(folder)


def initial_weight(layout: StudentLayout, generator: torch.Generator) -> Callable[[str, Shape], Tensor]:
    """A function that draws a tensor by its published name with T5's own initialisation, float32.

    The deviations are those of transformers' T5PreTrainedModel; the projection has that of torch.nn.Linear.
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
    """Write a safetensors file one tensor at a time, so that it may be larger than the memory, and get it onto the disk."""
    write_stream(path, {name: (dtype, shape) for name, shape in shapes.items()}, lambda name: draw(name, shapes[name]).to(dtype))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds by the clock, and seconds of processor time of all threads; the latter hardly change on a busy machine, given one thread."""

    wall_s: float
    cpu_s: float


def timed(action: Callable[[], Any], gpu: bool) -> tuple[Timing, Any]:
    """How long an action takes, the GPU's work included, and what it gives."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    if gpu:
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu), result


def in_fresh_process(script: str, task: dict[str, Any]) -> Any:
    """Run a benchmark in a process of its own with `--task`; what it prints in its last line, as JSON. Raises RuntimeError if it fails."""
    command = [sys.executable, str(Path(script).resolve()), "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def evict(path: Path) -> bool:
    """Drop a file from the system's page cache, so that the next read comes from the disk; False where that cannot be done."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def memory_gb() -> dict[str, float]:
    """Memory of this process in GB: `rss` now, `private` (not backed by a file) now, `peak` rss so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = {key: int(value) * 1024 / 1e9 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", status.read_text(), re.MULTILINE)}
        return {"rss": found["VmRSS"], "private": found["RssAnon"], "peak": found["VmHWM"]}
    info = psutil.Process().memory_full_info()
    return {"rss": info.rss / 1e9, "private": info.uss / 1e9, "peak": getattr(info, "peak_wset", info.rss) / 1e9}


def machine(comfyui: Path, gpu: bool, note: str) -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    version = re.search('"(.+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "comfyui": version[1] if version else "unknown",
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip() or "unknown",
        "load_average_at_start": round(psutil.getloadavg()[0], 2),
        "note": note,
    }


def save_result(result: dict[str, Any], kind: str, options: argparse.Namespace) -> Path:
    """Write a result as `<date>-<kind>.json`, or `<date>-<kind>-2.json` and so on if there is one; returns the path."""
    folder = options.out or (ROOT / ".dev" / "benchmarks" if options.quick else ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result['machine']['date'][:10]}-{kind}"
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [head, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if column == 0 else ":") for column, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _padded(row: list[str], widths: list[int]) -> list[str]:
    return [cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
