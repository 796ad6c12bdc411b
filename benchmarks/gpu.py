"""What everything costs on a GPU, at full size with random weights, in ten minutes at most; on a CPU the same at small sizes.

Each part is measured in a fresh process and written as soon as it is done. A part for which time, disk or memory are too small is left out,
and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
from distilled_t5.benchmarks.support import measuring
from distilled_t5.devtools.comfyui.in_process import ROOT, start_comfyui
from distilled_t5.devtools.docs.markdown import table
from distilled_t5.runtime.errors import UserError
from distilled_t5.train.gpus import gpu_named
from distilled_t5.train.recipe import load_recipe

# Of every published model that the recipes name.
PX_PER_TOKEN = 16
STUDENT, BF16, FP8 = "distilled_t5_base.safetensors", "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"
FLUX = "flux1-dev.safetensors"
# Bytes of weights by file, GB. Flux is written in bf16, as all of them but the fp8 one.
SIZES_GB = {STUDENT: 0.26, BF16: 9.5, FP8: 4.8, FLUX: 23.8, "flux1-schnell.safetensors": 23.8, "Chroma1-HD.safetensors": 17.8}
SIZES_GB |= {"sd3.5_medium.safetensors": 4.9, "pixart_alpha_1024_ms.safetensors": 1.2, "pixart_sigma_1024_ms.safetensors": 1.2}
# The shipped recipes whose teacher is T5-XXL; small runs have the first ones, one or two of each such family.
RECIPES = (
    *("flux-dev-paper", "pixart-sigma-24gb", "schnell-24gb", "sd35-medium-24gb", "chroma-24gb", "pixart-alpha-paper"),
    *("flux-overnight-24gb", "flux-dev-overnight-24gb", "flux-overnight-16gb", "flux-overnight-12gb"),
    *("flux-dev-large", "flux-dev-xl", "schnell-16gb", "schnell-12gb", "flux-dev-small"),
)
EVERY_FAMILY = RECIPES[:6]
# ComfyUI's own default on NVIDIA and AMD; the trainer cannot use it.
TWO_STREAMS, ONE_STREAM = ("--async-offload",), ("--disable-async-offload",)
STREAMS = {"two streams": TWO_STREAMS, "one stream": ONE_STREAM}
FP16 = ", fp16"
# All weights stay in RAM and are brought for every layer.
IN_RAM = ("--novram",)
# Guesses for the plan: seconds until a process has ComfyUI and a context, GB per second from the page cache into a model, and the share of
# the rate of a large matrix product.
START_S, LOAD_GB_PER_S, SHARE = 20.0, 1.5, 0.3
# A recipe's steps, the untimed one included, and about the most seconds that they take.
STEPS, MOST_S = 11, 90.0
COLUMNS = {
    "encoders": ("load_s", "first_encode_s", "next_encode_s", "new_prompt_s", "t5_weights_gb", "device_peak_gb", "runs_on"),
    "pipeline": ("mode", "first_image_s", "next_image_s", "next_encode_s", "device_peak_gb", "on_device_gb"),
    "recipe": ("resolution_px", "step_s", "step_tflop", "share_of_product", "share_of_peak", "device_peak_gb", "rehearsed_peak_gb"),
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

    def expected_s(self, device: dict[str, Any], missing_gb: float, size_gb: float) -> float:
        """A guess of its seconds at full size, of `size_gb` of files with `missing_gb` to be written."""
        computing = self.flop / (SHARE * device["product_flops_per_s"])
        if self.measure == "recipe":  # ends early on a slow device, after a third of the steps or more
            computing = min(computing, max(computing / 3, MOST_S))
        return START_S + missing_gb / device["write_gb_per_s"] + size_gb / LOAD_GB_PER_S + computing


def of_recipe(name: str, label: str = "", flags: tuple[str, ...] = ONE_STREAM, settings: tuple[str, ...] = ()) -> Part:
    """The trainer's steps of a recipe."""
    recipe = load_recipe(name)
    model, longest = recipe.diffusion_model.file, max(recipe.sampling.token_lengths)
    stages = {(stage.resolution_px, stage.batch) for stage in recipe.stages}
    tokens = sum(batch * ((side_px // PX_PER_TOKEN) ** 2 + longest) for side_px, batch in stages)
    # Two operations per weight and token, in bf16 two bytes per weight, four passes.
    flop = 1e9 * SIZES_GB[model] * 4 * tokens * STEPS
    arguments = {"name": name, "settings": settings}
    return Part(f"{name}{label}", "recipe", arguments, flags, (recipe.teacher.t5, model), flop)


def parts(recipes: tuple[str, ...] = RECIPES) -> Iterator[Part]:
    """Everything after the facts about the device, the most important first; a part that shares a large file comes soon after."""
    image_flop = 8 * 1e9 * SIZES_GB[FLUX] * (4096 + 256)
    yield Part("resume to the bit", "resume", {})
    yield Part("encoders", "encoders", {"encoders": (STUDENT, BF16, FP8)}, TWO_STREAMS, (STUDENT, BF16, FP8))
    both = {"encoders": (STUDENT, BF16), "modes": ("resident", "offload")}
    yield Part("pipeline", "pipeline", both, TWO_STREAMS, (STUDENT, BF16, FLUX), 12 * image_flop)
    yield of_recipe(recipes[0])
    for name, flags in STREAMS.items():
        one = {"encoders": (STUDENT,), "modes": ("resident",)}
        yield Part(f"pipeline, weights in RAM, {name}", "pipeline", one, flags + IN_RAM, (STUDENT, FLUX), 3 * image_flop)
    yield of_recipe(recipes[0], label=FP16, settings=("diffusion_model.dtype=fp16",))
    yield of_recipe(recipes[1])
    for name, flags in STREAMS.items():
        yield of_recipe(recipes[1], label=f", weights in RAM, {name}", flags=flags + IN_RAM)
    yield from map(of_recipe, recipes[2:])


def perform(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """In this process, the facts about the device, or what was measured of some parts."""
    start_comfyui(*task["flags"], "--base-directory", task["folder"])
    if "device" in task:
        from distilled_t5.benchmarks.support.gpu_parts import measure_device

        yield from measure_device(**task["device"])
    yield from measured(task.get("parts", ()), task.get("full", False))


def measured(chosen: Iterable[tuple[str, str, dict[str, Any]]], full: bool) -> Iterator[dict[str, Any]]:
    """Of each part, its rows or why it has none, and its seconds. ComfyUI must have been started."""
    import torch
    from distilled_t5.benchmarks.support import gpu_parts

    for name, measure, arguments in chosen:
        begin = time.monotonic()
        try:
            for row in gpu_parts.PARTS[measure](gpu_parts.FULL if full else gpu_parts.SMALL, **arguments):
                yield {"part": name, "row": row}
        except (torch.OutOfMemoryError, ValueError) as error:
            too_small = isinstance(error, torch.OutOfMemoryError) or str(error).startswith("Not enough ")
            yield {"part": name, "left_out" if too_small else "failed": str(error)}
        yield {"part": name, "seconds": time.monotonic() - begin}


@dataclasses.dataclass(frozen=True)
class Room:
    """What is left for a part: seconds, GB of disk and RAM, and the files that are there already."""

    time_s: float
    disk_gb: float
    ram_gb: float
    there: set[str]

    def too_small_for(self, part: Part, device: dict[str, Any]) -> str | None:
        """Why a part of full size cannot be measured. Whether a recipe fits RAM and device is for the trainer to say."""
        missing, size = (sum(SIZES_GB[name] for name in names) for names in ({*part.files} - self.there, part.files))
        expected_s = part.expected_s(device, missing, size)
        if expected_s > self.time_s:
            return f"time: about {expected_s:.0f} s needed, {self.time_s:.0f} s left"
        if missing > self.disk_gb:
            return f"disk: {missing:.1f} GB of files to write, {self.disk_gb:.1f} GB free"
        too_large = part.measure != "recipe" and size > self.ram_gb
        return f"RAM: {size:.1f} GB of weights to load, {self.ram_gb:.1f} GB available" if too_large else None


class Run:
    """A run of the benchmark: what it found so far, written after every row, and how much time is left."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder, self.end = folder, time.monotonic() + 60 * options.minutes
        task = {"flags": (), "folder": str(folder), "device": {"quick": options.quick, "note": options.note}}
        [self.device] = measuring.in_fresh_process(__file__, task, self.left_s)
        self.full: bool = self.device["full"]
        options.quick = not self.full
        self.path = measuring.result_path("gpu", options)
        self.found: dict[str, Any] = {"machine": self.device, "parts": {}, "left_out": {}, "failed": {}, "seconds": {}}
        self.save()
        print(f"{rows_table('device', 'device', [self.device])}\n\nwritten after every part: {self.path}", flush=True)

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def measure(self, group: list[Part], later: list[Part]) -> None:
        """Measure some parts in one process, unless they are left out."""
        names = ", ".join(part.name for part in group)
        print(f"\n{names}: {self.left_s:.0f} s left", flush=True)
        why = self._room(group[0], later).too_small_for(group[0], self.device) if self.full else None
        if why or self.left_s < 1:
            self._keep({"part": names, "left_out": why or "time: none left"})
            return
        task: dict[str, Any] = {"flags": group[0].flags, "folder": str(self.folder), "full": self.full}
        task["parts"] = [(part.name, part.measure, part.arguments) for part in group]
        try:
            for result in measuring.in_fresh_process(__file__, task, self.left_s):
                self._keep(result)
        except RuntimeError as error:
            self._keep({"part": names, "failed": str(error)})
            shutil.rmtree(self.folder / "models", ignore_errors=True)
        for part in group:
            if rows := self.found["parts"].get(part.name):
                print(f"\n{part.name}\n{rows_table(part.measure, part.name, rows)}", flush=True)

    def _room(self, part: Part, later: list[Part]) -> Room:
        """What is left, after removing files that no later part needs, and those of later parts if this one needs their disk space."""
        files = {path.name: path for path in self.folder.glob("models/*/*.safetensors") if path.name in SIZES_GB}
        missing, for_later = sum(SIZES_GB[name] for name in {*part.files} - {*files}), {name for one in later for name in one.files}
        for name in sorted({*files} - {*part.files}, key=lambda name: name in for_later):
            if name not in for_later or missing > shutil.disk_usage(self.folder).free / 1e9:
                files.pop(name).unlink()
        return Room(self.left_s, shutil.disk_usage(self.folder).free / 1e9, psutil.virtual_memory().available / 1e9, {*files})

    def _keep(self, result: dict[str, Any]) -> None:
        """Add a row, a part's seconds, or why it is left out or failed, which is printed."""
        name = result.pop("part")
        [(kind, value)] = result.items()
        if kind == "row":
            if "tflop_per_s" in value:
                value["share_of_product"] = value["tflop_per_s"] * 1e12 / self.device["product_flops_per_s"]
                value["share_of_peak"] = None
                with contextlib.suppress(UserError):
                    value["share_of_peak"] = value["tflop_per_s"] / gpu_named(self.device["device_name"]).bf16
            self.found["parts"].setdefault(name, []).append(value)
        else:
            self.found[kind][name] = value
        if kind in ("left_out", "failed"):
            print(f"{name}: {kind.replace('_', ' ')}: {value}", flush=True)
        self.save()

    def save(self) -> None:
        """Write what was found so far."""
        self.found["compared"] = compared(self.found["parts"])
        measuring.save_result(self.found, self.path)


def compared(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What parts say together: whether two streams change an image or losses, and how far losses in fp16 are from those in bf16."""
    one, two = (
        [row.get("losses") or row["latent_sha256"] for name in sorted(found) if name.endswith(stream) for row in found[name]]
        for stream in STREAMS
    )
    bf16, fp16 = ([loss for row in found.get(f"{RECIPES[0]}{label}", ()) for loss in row["losses"]] for label in ("", FP16))
    gaps = [abs(half - usual) / usual for half, usual in zip(fp16, bf16, strict=False)]
    same = one == two if one and len(one) == len(two) else None
    return {"two_streams_change_nothing": same, "fp16_losses_differ_by": max(gaps, default=None)}


def rows_table(measure: str, name: str, rows: list[dict[str, Any]]) -> str:
    """A table of the rows' main columns."""
    first = {"encoders": "encoder", "pipeline": "encoder", "recipe": "stage", "resume": "format"}.get(measure, "device")
    return table([name, *COLUMNS[measure]], [[row[first], *(row[key] for key in COLUMNS[measure])] for row in rows])


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
        everything = list(parts(RECIPES if run.full else EVERY_FAMILY))
        # A fault must not cost the parts after it. At small sizes starting would take most of the time.
        groups = [[part] for part in everything]
        if not run.full:
            ordered = sorted(everything, key=lambda part: part.flags)
            groups = [list(group) for _, group in itertools.groupby(ordered, lambda part: part.flags)]
        for number, group in enumerate(groups):
            run.measure(group, [part for one in groups[number + 1 :] for part in one])
    print(f"\nwritten: {run.path}")
    return int(bool(run.found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
