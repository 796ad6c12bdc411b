"""The report of a rehearsal: memory by part, whether it fits, operations, hours and cost on GPUs, RAM and disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import comfy.model_management

from ..config.files import shipped_names
from ..runtime.errors import UserError
from .cache_plan import expected
from .estimate import disk_lines, ram_lines
from .gpus import GPUS, SHOWN_BYTES_PER_GB, Gpu, gpu_named
from .memory import GB, Rehearsal, part_lines, ram_parts, usable_of
from .models import rehearsal_of, what_fits
from .recipe import Recipe, load_recipe

# Of the published peak, what a run is assumed to reach. Not measured.
SHARE = 0.4
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|g)?", re.IGNORECASE)
# The GPUs of the table of recipes.
SHOWN_GPUS = ("RTX 4090", "H100")


@dataclass(frozen=True)
class Question:
    """What is asked beside what the run takes: the memory of a device, a GPU, the share of its peak, a price per hour."""

    memory_bytes: int | None
    gpu: Gpu | None
    share: float = SHARE
    price: float | None = None

    @classmethod
    def of(cls, memory: str | None, gpu: str | None, share: float, price: float | None) -> Question:
        """From the command's options. Raises UserError."""
        if not 0 < share <= 1:
            raise UserError(f"--share: expected more than 0 and at most 1, got {share:g}.", f"give the share of the peak, such as {SHARE}.")
        if price is not None and price < 0:
            raise UserError(f"--price: expected 0 or more, got {price:g}.", "give the price of one GPU for an hour.")
        found = gpu_named(gpu) if gpu else None
        return cls(_bytes_of(memory) if memory else found.memory_bytes if found else None, found, share, price)


def _bytes_of(memory: str) -> int:
    match = MEMORY.fullmatch(memory.strip())
    if match is None or not float(match[1]):
        raise UserError(f"--memory: expected a size such as 12gb, got {memory}.", "give the memory of the GPU as it is sold.")
    return int(float(match[1]) * SHOWN_BYTES_PER_GB)


def report(recipe: Recipe, question: Question, flags: Sequence[str] = ()) -> str:
    """The rehearsal of a recipe as text, under ComfyUI started with these flags."""
    found = _rehearsal(recipe, flags)
    return "\n".join(
        [
            f"Rehearsal of {recipe.name} on fake tensors: memory and operations are counted, weights are not needed.",
            "",
            *_stage_lines(found),
            "",
            f"Peak of stage {found.largest.name}, during the {found.largest.need.during}, by part:",
            *part_lines(dict(sorted(found.largest.need.all_here.items(), key=lambda part: -part[1]))),
            *_teacher_lines(found, recipe.teacher.cache),
            "",
            *_fit_lines(recipe, found, question, flags),
            *_time_lines(found, question),
            "",
            *ram_lines(ram_parts(recipe, found, 1, found.model), 1),
            *disk_lines(recipe, found.parameters),
            *cache_lines(recipe, found),
        ]
    )


def _stage_lines(found: Rehearsal) -> list[str]:
    lines = [f"{'Stage':<24}{'steps':>9}{'peak':>11}{'offloaded':>12}{'per step':>16}"]
    for stage in found.stages:
        flops = sum(stage.flops.values()) + sum(stage.teacher_flops.values())
        sizes = f"{stage.need.total / GB:>8.2f} GB{stage.need.least / GB:>9.2f} GB"
        lines.append(f"{stage.name:<24}{stage.steps:>9,}{sizes}{flops / 1e12:>10,.1f} TFLOP")
    return [*lines, "offloaded: with all of the diffusion model in RAM, from where ComfyUI copies each weight when it is used."]


def _teacher_lines(found: Rehearsal, cache: str) -> list[str]:
    need = found.encoding
    room = "the diffusion model is loaded when it is done." if cache else "the diffusion model makes room for it."
    return [f"The teacher takes {need.total / GB:.2f} GB while it encodes, {need.least / GB:.2f} GB offloaded; {room}"]


def cache_lines(recipe: Recipe, found: Rehearsal) -> list[str]:
    """What the teacher's texts of a recipe with a cache take on disk."""
    if not recipe.teacher.cache:
        return []
    size = f"Teacher's texts on disk: {expected(recipe, found.text_width)} in {recipe.teacher.cache}"
    return [f"{size}; the hours include encoding them, at the same share. A teacher that is partly in RAM takes longer: see --estimate."]


def verdict(found: Rehearsal, memory_bytes: int) -> str:
    """Whether a run fits a device."""
    usable = usable_of(memory_bytes, found.on_gpu)
    if found.total <= usable:
        return "fits"
    if found.least <= usable:
        return f"fits with offloading: at least {min(found.model, found.total - usable) / GB:.1f} GB of the diffusion model stay in RAM"
    return f"does not fit: {found.least / GB:.1f} GB are needed with everything offloaded"


def _fit_lines(recipe: Recipe, found: Rehearsal, question: Question, flags: Sequence[str]) -> list[str]:
    if question.memory_bytes is None:
        return []
    name = f"{question.gpu.name}, " if question.gpu else ""
    usable = usable_of(question.memory_bytes, found.on_gpu)
    fit = f"{name}{question.memory_bytes / GB:.1f} GB, of which {usable / GB:.1f} GB can be used: {verdict(found, question.memory_bytes)}."
    if found.least <= usable:
        return [fit, ""]
    advice = what_fits(recipe, found, question.memory_bytes, lambda changed: _rehearsal(changed, flags, with_time=False))
    return [fit, f"What to do: {advice}", ""]


def hours(found: Rehearsal, gpu: Gpu, share: float) -> float:
    """Hours of a run on one GPU, at this share of its peaks."""
    steps = ((stage.steps, gpu.seconds(stage.flops, share) + gpu.seconds(stage.teacher_flops, share)) for stage in found.stages)
    return sum(count * seconds for count, seconds in steps) / 3600


def _time_lines(found: Rehearsal, question: Question) -> list[str]:
    lines = [
        f"Hours on one GPU at an assumed {question.share:.0%} of its published peak (dense, bf16; the teacher in fp32), "
        "without validation and previews:"
    ]
    for gpu in [question.gpu] if question.gpu else GPUS:
        taken = hours(found, gpu, question.share)
        cost = "" if question.price is None else f", {taken * question.price:,.2f} at {question.price:g} per hour"
        lines.append(f"  {gpu.name:<14}{taken:>10,.1f} h of {gpu.bf16:g} TFLOP/s{cost}   ({gpu.source})")
    return lines


def table(share: float = SHARE, flags: Sequence[str] = ()) -> Iterator[str]:
    """The lines of a Markdown table with a row for each shipped recipe: what its rehearsal counted."""
    heads = ["Recipe", "Peak on the GPU", "Offloaded", "Teacher", "RAM", "Operations", *(f"{name}, hours" for name in SHOWN_GPUS)]
    yield _row(heads)
    yield _row(["---"] * len(heads))
    for name in shipped_names():
        yield recipe_row(name, share, flags)


def recipe_row(name: str, share: float = SHARE, flags: Sequence[str] = ()) -> str:
    """The row of a shipped recipe."""
    recipe = load_recipe(name)
    found = _rehearsal(recipe, flags)
    ram = sum(ram_parts(recipe, found, 1, found.model).values())
    flops = sum(stage.steps * (sum(stage.flops.values()) + sum(stage.teacher_flops.values())) for stage in found.stages)
    sizes = [f"{size / GB:.1f} GB" for size in (found.total, found.least, found.encoding.total, ram)]
    taken = (hours(found, gpu_named(gpu), share) for gpu in SHOWN_GPUS)
    on_gpus = [f"{count:,.0f}" if round(count) else "under 1" for count in taken]
    return _row([f"`{name}`", *sizes, f"{_two_digits(flops / 1e18)} EFLOP", *on_gpus])


def _two_digits(value: float) -> str:
    return "under 0.1" if value < 0.1 else f"{float(f'{value:.2g}'):,g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rehearsal(recipe: Recipe, flags: Sequence[str], with_time: bool = True) -> Rehearsal:
    """On the device of this machine, or on a GPU in general where it has none and --cpu was not given."""
    device = comfy.model_management.get_torch_device()
    return rehearsal_of(recipe, device, as_gpu=device.type == "cpu" and "--cpu" not in flags, with_time=with_time)
