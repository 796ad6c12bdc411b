"""Seconds that the pack adds to ComfyUI's start."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from distilled_t5.benchmarks.support import measuring
from distilled_t5.benchmarks.support.start_cost import measured
from distilled_t5.devtools.comfyui.in_process import ROOT, start_comfyui

EXPECTED_START_S = 0.3


def start_cost(comfyui: Path, repeats: int) -> dict[str, Any]:
    """Seconds of ComfyUI's own imports and of the pack's, medians of processes; before several, one fills the page cache."""
    with tempfile.TemporaryDirectory() as base:
        runs = [measured(comfyui, ROOT, Path(base)) for _ in range(repeats + (repeats > 1))][-repeats:]
    medians = {key: statistics.median(run[key] for run in runs) for key in ("comfyui_s", "pack_s")}
    return {**medians, "modules": len(runs[0]["modules"]), "processes": repeats}


def main() -> None:
    """Measure, print, write the JSON."""
    options = measuring.command_line(__doc__ or "").parse_args()
    start = start_cost(start_comfyui("--cpu"), 1 if options.quick else 5)
    print(f"ComfyUI's imports {start['comfyui_s']:.2f} s, the pack's {start['pack_s']:.3f} s (expected: below {EXPECTED_START_S} s)")
    result = {"machine": measuring.machine(options.note), "start": start}
    print(f"written: {measuring.save_result(result, measuring.result_path('start', options))}")


if __name__ == "__main__":
    main()
