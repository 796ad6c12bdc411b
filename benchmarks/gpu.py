"""What everything costs on a GPU, at full size with random weights, in ten minutes at most; on a CPU the same at small sizes.

Each part is measured in a fresh process and written as soon as it is done. A part for which time, disk or memory are too small is left out,
and the result says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from distilled_t5.benchmarks.support import measuring
from distilled_t5.devtools.comfyui.in_process import ROOT, start_comfyui
from distilled_t5.devtools.docs.markdown import table
from distilled_t5.train.recipe import load_recipe

STUDENT, BF16, FP8 = "distilled_t5_base.safetensors", "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"
FLUX = "flux1-dev.safetensors"
# Bytes of weights by file, GB. Flux is written in bf16, as all of them but the fp8 one.
SIZES_GB = {STUDENT: 0.26, BF16: 9.5, FP8: 4.8, FLUX: 23.8, "flux1-schnell.safetensors": 23.8, "Chroma1-HD.safetensors": 17.8}
SIZES_GB |= {"sd3.5_medium.safetensors": 4.9, "pixart_alpha_1024_ms.safetensors": 1.2, "pixart_sigma_1024_ms.safetensors": 1.2}
# The shipped recipes for models of full size, the first the most telling.
RECIPES = (
    *("flux-dev-paper", "pixart-sigma-24gb", "schnell-24gb", "sd35-medium-24gb", "chroma-24gb", "flux-dev-large", "flux-dev-xl"),
    *("schnell-16gb", "schnell-12gb", "pixart-alpha-paper", "flux-dev-small"),
)
# ComfyUI's own default on NVIDIA and AMD; the trainer cannot use it.
TWO_STREAMS, ONE_STREAM = ("--async-offload",), ("--disable-async-offload",)
STREAMS = {"two streams": TWO_STREAMS, "one stream": ONE_STREAM}
# All weights stay in RAM and are brought for every layer.
IN_RAM = ("--novram",)
# Guesses for the plan: seconds until a process has ComfyUI and a context, GB per second from the page cache into a model, and the share of
# the rate of a large matrix product.
START_S, LOAD_GB_PER_S, SHARE = 20.0, 1.5, 0.3
COLUMNS = {
    "encoders": ("load_s", "first_encode_s", "next_encode_s", "new_prompt_s", "t5_weights_gb", "device_peak_gb", "runs_on"),
    "pipeline": ("mode", "first_image_s", "next_image_s", "next_encode_s", "device_peak_gb", "on_device_gb"),
    "recipe": ("resolution_px", "batch", "steps", "step_s", "step_tflop", "share_of_product", "device_peak_gb", "estimated_gb", "skipped"),
    "resume": ("same_bits", "repeatable"),
    "device": ("device_name", "device_free_gb", "product_flops_per_s", "to_device_gb_per_s", "write_gb_per_s"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to measure: a function of `gpu_parts` with its arguments, ComfyUI's flags, the files, and about how many operations."""

    name: str
    measure: str
    arguments: dict[str, Any]
    flags: tuple[str, ...] = ONE_STREAM
    files: tuple[str, ...] = ()
    flop: float = 0.0

    def expected_s(self, device: dict[str, Any], there: set[str]) -> float:
        """A guess of its seconds at full size, with files that are there already."""
        written = sum(SIZES_GB[name] for name in self.files if name not in there)
        writing, computing = written / device["write_gb_per_s"], self.flop / (SHARE * device["product_flops_per_s"])
        return START_S + writing + sum(SIZES_GB[name] for name in self.files) / LOAD_GB_PER_S + computing


def of_recipe(name: str, steps: int = 10, label: str = "", flags: tuple[str, ...] = ONE_STREAM, settings: tuple[str, ...] = ()) -> Part:
    """The trainer's steps of a recipe."""
    recipe = load_recipe(name)
    model, longest = recipe.diffusion_model.file, max(recipe.sampling.token_lengths)
    stages = {(stage.resolution_px, stage.batch) for stage in recipe.stages}
    tokens = sum(batch * (recipe.family.image_tokens(side_px) + longest) for side_px, batch in stages)
    # Two operations per weight and token, in bf16 two bytes per weight, four passes.
    flop = 1e9 * SIZES_GB[model] * 4 * tokens * (steps + 1)
    arguments = {"name": name, "settings": settings}
    return Part(f"{name}{label}", "recipe", arguments, flags, (recipe.teacher.t5, model), flop)


def parts(recipes: tuple[str, ...] = RECIPES) -> Iterator[Part]:
    """Everything after the facts about the device, the most important first; a part that shares a large file comes soon after."""
    image_flop = 8 * 1e9 * SIZES_GB[FLUX] * (4096 + 256)
    yield Part("resume to the bit", "resume", {})
    yield Part("encoders", "encoders", {}, TWO_STREAMS, (STUDENT, BF16, FP8))
    both = {"encoders": (STUDENT, BF16), "modes": ("resident", "offload")}
    yield Part("pipeline", "pipeline", both, TWO_STREAMS, (STUDENT, BF16, FLUX), 12 * image_flop)
    yield of_recipe(recipes[0])
    for name, flags in STREAMS.items():
        one = {"encoders": (STUDENT,), "modes": ("resident",)}
        yield Part(f"pipeline, weights in RAM, {name}", "pipeline", one, flags + IN_RAM, (STUDENT, FLUX), 3 * image_flop)
    yield of_recipe(recipes[0], label=", fp16", settings=("diffusion_model.dtype=fp16",))
    yield of_recipe(recipes[1])
    for name, flags in STREAMS.items():
        yield of_recipe(recipes[1], label=f", weights in RAM, {name}", flags=flags + IN_RAM)
    yield from map(of_recipe, recipes[2:])


def perform(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure parts in this process: a row each time, or why a part is left out."""
    start_comfyui(*task["flags"], "--base-directory", task["folder"])
    import torch
    from distilled_t5.benchmarks.support import gpu_parts

    if "device" in task:
        yield from gpu_parts.measure_device(**task["device"])
    for name, measure, arguments in task.get("parts", ()):
        begin = time.monotonic()
        try:
            for row in gpu_parts.PARTS[measure](gpu_parts.FULL if task["full"] else gpu_parts.SMALL, **arguments):
                yield {"part": name, "row": row}
        except (torch.OutOfMemoryError, ValueError) as error:
            yield {"part": name, "left_out": f"{type(error).__name__}: {error}"}
        yield {"part": name, "seconds": time.monotonic() - begin}


class Run:
    """A run of the benchmark: what it found so far, written after every row, and how much time is left."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.begin = options, folder, time.monotonic()
        flags = ["--base-directory", str(folder)]
        [self.device] = measuring.in_fresh_process(__file__, {"flags": flags, "folder": str(folder), "device": self._asked()}, self.left_s)
        self.options.quick = not self.device["full"]
        self.path = measuring.result_path("gpu", options)
        self.found: dict[str, Any] = {"machine": self.device, "parts": {}, "left_out": {}, "failed": {}, "seconds": {}}
        self._save()
        print(f"{rows_table('device', {'': [self.device]})}\n\nwritten as it is measured: {self.path}", flush=True)

    def _asked(self) -> dict[str, Any]:
        return {"quick": self.options.quick, "note": self.options.note}

    @property
    def left_s(self) -> float:
        return 60 * self.options.minutes - (time.monotonic() - self.begin)

    def measure(self, group: list[Part], later: list[Part]) -> None:
        """Measure some parts in one process, unless they are left out."""
        if self.device["full"] and (why := self._too_much(group[0], later)):
            self.found["left_out"][group[0].name] = why
        else:
            names = ", ".join(part.name for part in group)
            print(f"\n{names}: {self.left_s:.0f} s left", flush=True)
            task = {"flags": group[0].flags, "folder": str(self.folder), "full": self.device["full"]}
            task["parts"] = [(part.name, part.measure, part.arguments) for part in group]
            try:
                for result in measuring.in_fresh_process(__file__, task, max(1.0, self.left_s)):
                    self._keep(result)
            except RuntimeError as error:
                self.found["failed"][names] = str(error)
                shutil.rmtree(self.folder / "models", ignore_errors=True)
        self._save()
        for part in group:
            self._show(part)

    def _too_much(self, part: Part, later: list[Part]) -> str | None:
        """Why a part cannot be measured. Files that only later parts need make room for its own."""
        there = {path.name: path for path in self.folder.glob("models/*/*.safetensors")}
        kept = {name for one in (part, *later) for name in one.files}
        size = sum(SIZES_GB[name] for name in part.files)
        missing = sum(SIZES_GB[name] for name in part.files if name not in there)
        for name, path in there.items():
            if name in SIZES_GB and name not in part.files and (name not in kept or missing > shutil.disk_usage(self.folder).free / 1e9):
                path.unlink()
        expected_s = part.expected_s(self.device, {*there})
        disk_gb, ram_gb = shutil.disk_usage(self.folder).free / 1e9, psutil.virtual_memory().available / 1e9
        if expected_s > self.left_s:
            return f"time: about {expected_s:.0f} s, {self.left_s:.0f} s left"
        if missing > disk_gb:
            return f"disk: {missing:.1f} GB of files, {disk_gb:.1f} GB free"
        return f"RAM: {size:.1f} GB of weights, {ram_gb:.1f} GB available" if size > ram_gb else None

    def _keep(self, result: dict[str, Any]) -> None:
        name = result.pop("part")
        if row := result.get("row"):
            if "tflop_per_s" in row:
                row["share_of_product"] = row["tflop_per_s"] * 1e12 / self.device["product_flops_per_s"]
            self.found["parts"].setdefault(name, []).append(row)
        else:
            [(kind, value)] = result.items()
            self.found[kind][name] = value
        self._save()

    def _save(self) -> None:
        measuring.save_result(self.found, self.path)

    def _show(self, part: Part) -> None:
        if rows := self.found["parts"].get(part.name):
            print(f"\n{part.name}\n{rows_table(part.measure, {part.name: rows})}", flush=True)
        for kind in ("left_out", "failed"):
            if why := self.found[kind].get(part.name):
                print(f"\n{part.name}: {kind.replace('_', ' ')}: {why}", flush=True)


def rows_table(measure: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """A table of the rows' main columns."""
    named = [(row.get("encoder") or row.get("stage") or row.get("format") or name, row) for name, rows in found.items() for row in rows]
    return table(["", *COLUMNS[measure]], [[name, *(row[key] for key in COLUMNS[measure])] for name, row in named])


def main() -> int:
    """Measure, print, write the JSON; 1 if a part failed."""
    parser = measuring.command_line(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=10.0, help="the time that it may take (default: %(default)g)")
    parser.add_argument("--files", type=Path, default=ROOT / ".dev", metavar="FOLDER", help="where random weights are written: 40 GB")
    options = measuring.with_task(parser, perform)
    if options is None:
        return 0
    with measuring.scratch_folder(2, options.files) as folder:
        run = Run(options, folder)
        everything = list(parts())
        # A fault must not cost the parts after it; at small sizes starting would take most of the time.
        groups = [[part] for part in everything]
        if not run.device["full"]:
            ordered = sorted(everything, key=lambda part: part.flags)
            groups = [list(group) for _, group in itertools.groupby(ordered, lambda part: part.flags)]
        for number, group in enumerate(groups):
            run.measure(group, [part for one in groups[number + 1 :] for part in one])
    print(f"\nwritten: {run.path}")
    return int(bool(run.found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
