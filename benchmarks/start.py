"""What the pack costs a person who does not use it: seconds added to ComfyUI's start, and how soon Cancel stops loading and saving."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distilled_t5.benchmarks.support import measuring as measure
from distilled_t5.benchmarks.support.start_cost import measured
from distilled_t5.devtools.comfyui.in_process import ROOT, start_comfyui
from distilled_t5.devtools.comfyui.server import ComfyServer
from distilled_t5.devtools.comfyui.watch import Watched
from distilled_t5.encoder.files import write_student
from distilled_t5.students.t5.layout import StudentLayout

# A published pack should take less; ComfyUI polls for Cancel, so an instant stop is not to be had.
EXPECTED_START_S, EXPECTED_CANCEL_S = 0.3, 0.5
FILE = "encoder.safetensors"


def start_cost(comfyui: Path, repeats: int) -> dict[str, Any]:
    """Seconds of ComfyUI's own imports and of the pack's, in processes of their own; a first one before several fills the page cache."""
    with tempfile.TemporaryDirectory() as base:
        runs = [measured(comfyui, ROOT, Path(base)) for _ in range(repeats + (repeats > 1))][-repeats:]
    return {
        "host_s": statistics.median(run["host_s"] for run in runs),
        "pack_s": statistics.median(run["pack_s"] for run in runs),
        "modules": len(runs[0]["modules"]),
        "processes": repeats,
    }


def load_and_save(token_length: int) -> dict[str, Any]:
    """A prompt that loads the encoder and saves copies; another token length makes it a new one.

    One copy is measured; the others are there for a disk that is faster than the press of Cancel.
    """
    loader = {"clip_name1": "none", "clip_name2": FILE, "type": "flux", "token_length": token_length}
    prompt = {"1": {"class_type": "DistilledT5Loader", "inputs": loader, "_meta": {"title": "Load"}}}
    for number in range(2, 8):
        saver = {"clip": ["1", 0], "filename": f"copy {number}", "dtype": "as loaded"}
        prompt[str(number)] = {"class_type": "DistilledT5Save", "inputs": saver, "_meta": {"title": "Save"}}
    return prompt


def is_under_way(wanted: str, node: str, done: int) -> bool:
    """Whether a node has told that a part of its work is done; any Save stands for the others."""
    return done > 0 and (node == wanted or "1" not in (node, wanted))


def cancel_cost(comfyui: Path, folder: Path, size: str, repeats: int) -> dict[str, Any]:
    """Seconds from a press of Cancel to the end of the prompt, while a file of that size is loaded and while it is saved."""
    layout = StudentLayout.named(size)
    models = folder / "models" / "text_encoders"
    models.mkdir(parents=True)
    draw = measure.initial_weight(layout, torch.Generator().manual_seed(0))
    tensors = {name: draw(name, shape).to(torch.bfloat16) for name, shape in layout.tensors().items()}
    path = write_student(models / FILE, tensors)
    del tensors
    seconds: dict[str, list[float]] = {"loading": [], "saving": []}
    with ComfyServer(comfyui, folder, ROOT) as server:
        for number in range(repeats):
            for place, (what, node) in enumerate({"loading": "1", "saving": "2"}.items()):
                # Not at its first progress: then nothing is read or written yet.
                under_way = partial(is_under_way, node)
                kind, taken_s = Watched(server, load_and_save(64 + 2 * number + place)).run(under_way)
                if kind != "execution_interrupted":
                    raise RuntimeError(f"{what} ended before it could be cancelled ({kind}): take a larger file")
                seconds[what].append(taken_s)
    slowest = {f"{what}_cancel_s": max(times) for what, times in seconds.items()}
    return {"size": size, "file_gb": path.stat().st_size / 1e9, "repeats": repeats, **slowest}


def main() -> None:
    """Measure, print, keep."""
    options = measure.command_line(__doc__ or "").parse_args()
    comfyui = start_comfyui()
    size, repeats = ("base", 1) if options.quick else ("xl", 5)
    result: dict[str, Any] = {"machine": measure.machine(comfyui, False, options.note), "start": start_cost(comfyui, repeats)}
    with measure.scratch_folder(12.0) as folder:
        result["cancel"] = cancel_cost(comfyui, folder, size, repeats)
    start, cancel = result["start"], result["cancel"]
    print(f"ComfyUI's own imports {start['host_s']:.2f} s, the pack's {start['pack_s']:.3f} s (expected: below {EXPECTED_START_S} s)")
    for what in ("loading", "saving"):
        print(
            f"Cancel while {what} {cancel['file_gb']:.2f} GB: at most {cancel[f'{what}_cancel_s']:.2f} s (expected: {EXPECTED_CANCEL_S} s)"
        )
    print(f"JSON: {measure.save_result(result, 'start', options)}")


if __name__ == "__main__":
    main()
