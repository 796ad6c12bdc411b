"""An estimate of a run from three measured steps: memory by part, seconds per step, hours per stage, disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management

from ..encoder.teacher import Teacher
from ..runtime.accelerator import timed
from ..runtime.ranks import Ranks
from .cache_plan import expected, of_an_estimate
from .distill import train_step
from .memory import GB, SAVED_BYTES, TEACHER, part_lines, ram_parts
from .recipe import Recipe
from .report import memory_mb, reset_peak_memory
from .teacher_cache import CachedTexts
from .teacher_chunks import chunk_of, texts_of
from .workshop import Workshop, open_workshop

MEASURED_STEPS = 3


@dataclass(frozen=True)
class StageEstimate:
    """One stage as measured, in seconds, and memory in MB by kind.

    optimizer_s: an optimizer step after the first one. encode_s: the teacher's work for one trajectory. swap_s: swapping the diffusion
    model for the teacher and back.
    """

    name: str
    steps: int
    optimizer_s: float
    encode_s: float
    swap_s: float
    steps_per_trajectory: int
    trajectories_per_chunk: int
    memory_mb: dict[str, float]

    @property
    def step_s(self) -> float:
        """Seconds of a step with its share of the work per trajectory and per chunk."""
        return self.optimizer_s + (self.encode_s + self.swap_s / self.trajectories_per_chunk) / self.steps_per_trajectory

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600


def estimate(recipe: Recipe, ranks: Ranks) -> str:
    """Load everything, take three steps of each stage without saving, and report. Raises what a run would raise.

    A cache is not made: some texts are encoded into a folder that is removed, and the others are counted.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if recipe.teacher.cache:
            recipe = recipe.with_cache(ranks.share(scratch))
        workshop = open_workshop(recipe, ranks, texts=of_an_estimate)
        with workshop.model.differentiable(recipe.diffusion_model.checkpoint_blocks):
            stages = [_measure(workshop, number) for number in range(len(recipe.stages))]
    return "\n".join(
        [
            *_memory_lines(workshop),
            "",
            *_ram_lines(workshop),
            *_stage_lines(recipe, stages),
            "",
            *disk_lines(recipe, sum(one.student.layout.parameters for one in workshop.all)),
            *_cache_lines(workshop),
        ]
    )


def _cache_lines(workshop: Workshop) -> list[str]:
    if not isinstance(cache := workshop.teacher, CachedTexts):
        return []
    plan = expected(workshop.recipe, workshop.model.text_width)
    hours = plan.texts * cache.seconds / max(1, cache.encoded) / workshop.ranks.world / 3600
    return [f"Teacher's texts on disk: {plan}, {hours:.2f} hours before the first step, measured on {cache.encoded} texts."]


def _measure(workshop: Workshop, number: int) -> StageEstimate:
    stage, schedule, objective = workshop.recipe.stages[number], workshop.schedule, workshop.objective(number)
    batches, device = schedule.batches(number, 0), workshop.model.device
    steps = workshop.recipe.trajectory_steps(stage)
    # As before each chunk of a run, the diffusion model is on the device.
    workshop.load_model()
    reset_peak_memory()
    teacher_comes_s = timed(workshop.teacher.clip.load_model, device)[0] if isinstance(workshop.teacher, Teacher) else 0.0
    encode_s, texts = timed(lambda: texts_of(workshop.teacher, batches), device)
    model_comes_s, positions = timed(lambda: workshop.starts(batches, texts, max(steps, MEASURED_STEPS)), device)
    seconds = []
    for _ in range(min(MEASURED_STEPS, len(positions[0].sigmas_T) - 1)):
        step_s, (_, positions) = timed(lambda places=positions: train_step(places, workshop.model, workshop.learners, objective), device)
        seconds.append(step_s)
    # The first step of a size is slower: memory is allocated and kernels are chosen.
    settled = seconds[1:] or seconds
    chunk = chunk_of(0, schedule.prompts_per_trajectory(number), workshop.recipe.teacher.at_a_time, schedule.trajectories(number))
    return StageEstimate(
        stage.name,
        stage.steps,
        optimizer_s=sum(settled) / len(settled),
        encode_s=encode_s,
        swap_s=teacher_comes_s + model_comes_s,
        steps_per_trajectory=steps,
        trajectories_per_chunk=len(chunk),
        memory_mb=memory_mb(),
    )


def _memory_lines(workshop: Workshop) -> list[str]:
    rehearsal, device = workshop.rehearsal, workshop.model.device
    total = comfy.model_management.get_total_memory(device)
    if rehearsal is None:
        return [f"Memory on {device}: {total / GB:.2f} GB available. What a step takes could not be rehearsed."]
    stage = rehearsal.largest
    sums = [f"{rehearsal.total / GB:.2f} GB in all, {total / GB:.2f} GB available."]
    if rehearsal.on_gpu:
        sums.append(
            f"{rehearsal.least / GB:.2f} GB with as much left in RAM as ComfyUI can, "
            f"where the diffusion model takes {rehearsal.model / GB:.2f} GB and the teacher's encoders {rehearsal.teacher / GB:.2f} GB."
        )
    parts = [*part_lines(stage.need.all_here), *part_lines({TEACHER: rehearsal.teacher_beside})]
    return [f"Memory on {device} by part, rehearsed for stage {stage.name}:", *parts, *(f"  {line}" for line in sums)]


def _ram_lines(workshop: Workshop) -> list[str]:
    rehearsal, processes = workshop.rehearsal, workshop.ranks.world
    if rehearsal is not None and rehearsal.on_gpu:
        return [*ram_lines(ram_parts(workshop.recipe, rehearsal, processes, rehearsal.model), processes), ""]
    if rehearsal is not None and processes > 1:
        return [f"Each of the {processes} processes takes this much RAM: {_for_all(rehearsal.total, processes)}.", ""]
    return []


def ram_lines(parts: Mapping[str, int], processes: int) -> list[str]:
    """The RAM of a process on a GPU, by part, and that of all processes."""
    each = sum(parts.values())
    together = f" for each process, {_for_all(each, processes)}" if processes > 1 else ""
    return [
        "RAM by part, at most:",
        *part_lines(parts),
        f"  {each / GB:.2f} GB in all{together}, plus about 2 GB for Python and its libraries.",
    ]


def _for_all(each: int, processes: int) -> str:
    return f"{each * processes / GB:.2f} GB for {processes} processes on one machine"


def _stage_lines(recipe: Recipe, stages: list[StageEstimate]) -> list[str]:
    lines = [f"{'Stage':<24}{'steps':>9}{'s/step':>9}{'hours':>9}   measured memory"]
    for stage in stages:
        memory = ", ".join(f"{name} {value:,.0f}" for name, value in stage.memory_mb.items())
        lines.append(f"{stage.name:<24}{stage.steps:>9,}{stage.step_s:>9.2f}{stage.hours:>9.2f}   {memory}")
    total = sum(stage.hours for stage in stages)
    return [*lines, f"{'all':<24}{sum(stage.steps for stage in recipe.stages):>9,}{'':>9}{total:>9.2f}   without validation and previews"]


def disk_lines(recipe: Recipe, parameters: int) -> list[str]:
    """The disk that checkpoints and encoders take, for students of so many weights in sum."""
    # The last ones, the best one, and the one that is being written; of several students, also the one before it.
    several = len(recipe.students) > 1
    kept, size_gb = recipe.checkpoints.keep_last + 2 + several, parameters * SAVED_BYTES / GB
    encoders = f"{len(recipe.students)} encoders" if several else "the encoder"
    return [
        f"Disk: {kept * size_gb:.2f} GB for at most {kept} checkpoints of {size_gb:.2f} GB, {parameters * 4 / GB:.2f} GB for {encoders}."
    ]
