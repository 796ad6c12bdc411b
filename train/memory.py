"""The memory that a run needs, by part, as its rehearsal counted it, compared with that of the device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..config.files import shipped_names
from ..families.family import Family
from .gpus import SHOWN_BYTES_PER_GB
from .recipe import Recipe, Stage, load_recipe
from .teacher_chunks import chunk_of

GB = 1e9
# A checkpoint: weight and two running means, float32.
FLOAT32_BYTES, SAVED_BYTES = 4, 12
# Share of a GPU's memory that a run can use: its driver needs some, and some is lost between tensors.
USABLE = 0.95
# What a fast desktop CPU sustains, an assumption: floating-point operations per second.
CPU_FLOPS = 1e12
NOT_PRACTICAL_DAYS = 10
STATED_GB = re.compile(r"-(\d+)gb$")
# Parts of the RAM beside a GPU.
TEACHER, DIFFUSION_MODEL, CHECKPOINT = "teacher's encoders", "diffusion model, while the teacher works", "a checkpoint, while it is saved"


@dataclass(frozen=True)
class Need:
    """Bytes on the device at the peak of some work, by part.

    all_here: with all of the frozen model on the device. offloaded: with all of it in RAM, from where each weight is copied when it is
    used. during: what is being computed at the peak of all_here.
    """

    all_here: Mapping[str, int]
    offloaded: Mapping[str, int]
    during: str

    @property
    def total(self) -> int:
        """Bytes with all of the model on the device."""
        return sum(self.all_here.values())

    @property
    def least_parts(self) -> Mapping[str, int]:
        """The parts with as much in RAM as ComfyUI can leave there."""
        return min(self.all_here, self.offloaded, key=lambda parts: sum(parts.values()))

    @property
    def least(self) -> int:
        """Bytes that are needed even then."""
        return sum(self.least_parts.values())


@dataclass(frozen=True)
class StageRehearsal:
    """A stage of a run: its peak, and the floating-point operations of a step by number format, without and with the teacher's work.

    flops, teacher_flops: of one process, for an optimizer step and for the teacher's share of it.
    """

    name: str
    steps: int
    need: Need
    flops: Mapping[str, float]
    teacher_flops: Mapping[str, float]


@dataclass(frozen=True)
class Rehearsal:
    """What a process of a run takes.

    model, teacher, student, moments: bytes of weights as they are held, and of the optimizer's running means. parameters: the students'
    number of weights. text_width: channels of the text. encoding: the teacher's peak. cached: the teacher is gone when the student is
    trained.
    """

    stages: Sequence[StageRehearsal]
    model: int
    teacher: int
    student: int
    moments: int
    parameters: int
    text_width: int
    encoding: Need
    on_gpu: bool
    cached: bool = False

    @property
    def largest(self) -> StageRehearsal:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.need.total)

    @property
    def total(self) -> int:
        """Bytes on the device with the diffusion model on it; on a CPU the teacher is there too, or before it where there is a cache."""
        training = self.largest.need.total
        return training if self.on_gpu else max(training, self.encoding.total) if self.cached else training + self.teacher

    @property
    def teacher_beside(self) -> int:
        """Bytes of the teacher that are on the device while the student is trained."""
        return 0 if self.on_gpu or self.cached else self.teacher

    @property
    def least(self) -> int:
        """Bytes on the device with as much in RAM as ComfyUI can leave there."""
        return max(stage.need.least for stage in self.stages) if self.on_gpu else self.total

    def room(self, has_moments: bool, device_bytes: int) -> int:
        """Bytes that an optimizer step takes in addition to what is on the device: ComfyUI is asked to keep them free.

        By default it keeps only what inference needs. The student's weights are there already, and the optimizer's running means after the
        first step. Weights that a device of `device_bytes` cannot hold are copied from RAM.
        """
        taken = self.student + (self.moments if has_moments else 0)
        needs = [stage.need for stage in self.stages]
        if self.on_gpu and self.total > usable_of(device_bytes, True):
            return max(sum(need.offloaded.values()) for need in needs) - taken
        return max(need.total for need in needs) - self.model - taken


def ram_parts(recipe: Recipe, rehearsal: Rehearsal, processes: int, model: int) -> dict[str, int]:
    """Upper bound of the RAM of each process of a run on a GPU, in bytes by part, in the stage that needs most.

    `model`: bytes of the diffusion model that come to RAM. Python and its libraries (about 2 GB), the system's file cache, and what ComfyUI
    holds of the graph's own models are not included.
    """
    text = (max(recipe.sampling.token_lengths) + recipe.family.most_rows_before) * rehearsal.text_width * FLOAT32_BYTES
    validated = recipe.stages[-1].batch
    return {
        # With a cache, the teacher is gone when the diffusion model is loaded.
        TEACHER: max(0, rehearsal.teacher - model) if recipe.teacher.cache else rehearsal.teacher,
        DIFFUSION_MODEL: model,
        "teacher's embeddings of one chunk": max(_chunk_prompts(recipe, stage, processes) for stage in recipe.stages) * text,
        "teacher's embeddings of held-out prompts": min(
            recipe.validation.prompts, -(-recipe.validation.prompts // (validated * processes)) * validated
        )
        * text,
        CHECKPOINT: rehearsal.parameters * SAVED_BYTES,
    }


def _chunk_prompts(recipe: Recipe, stage: Stage, processes: int) -> int:
    prompts = stage.batch * stage.batches_per_rank(processes)
    return prompts * len(chunk_of(0, prompts, recipe.teacher.at_a_time, -(-stage.steps // recipe.trajectory_steps(stage))))


def part_lines(parts: Mapping[str, int]) -> list[str]:
    """A line for each part, in GB of 10^9 bytes."""
    return [f"  {name:<42}{size / GB:>9.3f} GB" for name, size in parts.items() if size]


def check_memory(rehearsal: Rehearsal, total_bytes: int, device: str, advice: Callable[[], str]) -> None:
    """Raise ValueError if the device cannot hold the run, with what is needed, what is available and what `advice` says to do."""
    usable = usable_of(total_bytes, rehearsal.on_gpu)
    if rehearsal.least <= usable:
        return
    stage = max(rehearsal.stages, key=lambda stage: stage.need.least)
    offloaded = " even with as much left in RAM as ComfyUI can" if rehearsal.on_gpu else ""
    who = f"stage {stage.name}"
    parts = dict(stage.need.least_parts) if rehearsal.on_gpu else {**rehearsal.largest.need.all_here, TEACHER: rehearsal.teacher_beside}
    if sum(parts.values()) < rehearsal.least:
        who, parts = "the teacher", {TEACHER: rehearsal.teacher, "its activations": rehearsal.encoding.total - rehearsal.teacher}
    raise ValueError(
        f"Not enough memory on {device}: {who} needs {rehearsal.least / GB:.1f} GB{offloaded}; "
        f"{device} has {total_bytes / GB:.1f} GB, of which a run can use {usable / GB:.1f} GB.\n"
        + "\n".join(part_lines(parts))
        + f"\nWhat to do: {advice()}"
    )


def usable_of(total_bytes: int, on_gpu: bool) -> int:
    """The bytes of a device that a run can use."""
    return int(total_bytes * USABLE) if on_gpu else total_bytes


def least_ram(parts: Mapping[str, int]) -> Mapping[str, int]:
    """The parts that are in the RAM beside a GPU at the same time.

    That is teacher and diffusion model while they are loaded, or the diffusion model and the teacher's embeddings while the teacher works.
    """
    loading = {name: parts[name] for name in (TEACHER, DIFFUSION_MODEL)}
    encoding = {name: size for name, size in parts.items() if name not in (TEACHER, CHECKPOINT)}
    return max(loading, encoding, key=lambda at_once: sum(at_once.values()))


def check_ram(parts: Mapping[str, int], total_bytes: int, processes: int, advice: Callable[[], str]) -> None:
    """Raise ValueError if the RAM of a machine with GPUs cannot hold what its processes have there, with what `advice` says to do."""
    least = least_ram(parts)
    needed = processes * sum(least.values())
    if needed <= total_bytes:
        return
    who = "the run needs" if processes == 1 else f"the {processes} processes on this machine need"
    raise ValueError(
        f"Not enough RAM beside the GPU: {who} {needed / GB:.1f} GB; this machine has {total_bytes / GB:.1f} GB.\n"
        + "\n".join(part_lines(least))
        + f"\nWhat to do: {advice()}"
    )


def without_gpu(rehearsal: Rehearsal, family: Family) -> str:
    """What a run on the CPU means in time; "" for less than an hour."""
    hours = sum(stage.steps * sum(stage.flops.values()) for stage in rehearsal.stages) / CPU_FLOPS / 3600
    if hours < 1:
        return ""
    time = f"{hours / 24:,.0f} days" if hours >= 48 else f"{hours:.0f} hours"
    said = "No GPU is used (none was found, or --cpu was given): the run is computed on the CPU."
    said += f" It takes about {time} at an assumed {CPU_FLOPS / 1e12:g} TFLOP/s."
    if hours <= 24 * NOT_PRACTICAL_DAYS:
        return said
    smallest = min(stated_gb(family).items(), default=None)
    return f"{said} That is not practical: use a GPU{f'; {smallest[1]} runs on {smallest[0]} GB' if smallest else ''}."


def shipped_advice(family: Family, total_bytes: int, on_gpu: bool) -> str:
    """Which shipped recipe is for a device of this memory."""
    if not on_gpu:
        return f"The shipped recipe smoke runs on any machine, but {family.display_name} needs a GPU."
    fitting = shipped_for(total_bytes, family)
    if fitting:
        return f"The shipped recipe {fitting} is made for this much memory."
    return f"No shipped recipe is made for {'so little memory' if stated_gb(family) else family.display_name}."


def shipped_for(total_bytes: int, family: Family) -> str | None:
    """Of the family's recipes with a memory size in their name (`schnell-12gb`), the largest that a device of this memory can hold."""
    fitting = ((size, name) for size, name in stated_gb(family).items() if size * SHOWN_BYTES_PER_GB <= total_bytes)
    return max(fitting, default=(0, None))[1]


def stated_gb(family: Family) -> dict[int, str]:
    """The family's shipped recipes by the memory size in their names, GB; of those of one size, the shortest name for one night."""
    names = sorted(shipped_names(), key=lambda name: ("-overnight-" in name, -len(name)))
    stated = [(int(match[1]), name) for name in names if (match := STATED_GB.search(name))]
    return {size: name for size, name in stated if load_recipe(name).family == family}
