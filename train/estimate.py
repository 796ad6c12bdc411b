"""What a run will take, before it is started: memory by part, seconds per step, hours per stage, disk. From three measured steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

import comfy.model_management
import torch

from .distill import train_step
from .memory import GB, part_lines
from .objectives import OBJECTIVES
from .ranks import Ranks
from .recipe import Recipe
from .report import memory_mb
from .run import Workshop, open_workshop
from .velocity import differentiable, held_bytes

MEASURED_STEPS = 3
# A checkpoint holds each weight and the two numbers that AdamW keeps of it, in float32.
BYTES_PER_SAVED_WEIGHT = 4 + 8


@dataclass(frozen=True)
class StageEstimate:
    """One stage as measured: seconds of an optimizer step without its first one, and memory afterwards in MB by kind."""

    name: str
    steps: int
    step_s: float
    start_s: float
    memory_mb: dict[str, float]

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600


def estimate(recipe: Recipe, ranks: Ranks) -> str:
    """Load everything, take three steps of each stage without saving any, and report. Raises what a run would raise."""
    workshop = open_workshop(recipe, ranks)
    with differentiable(workshop.flow.model.diffusion_model, recipe.diffusion_model.checkpoint_blocks):
        stages = [_measure(workshop, number) for number in range(len(recipe.stages))]
    return "\n".join([*_memory_lines(workshop), "", *_stage_lines(recipe, stages), "", *_disk_lines(workshop)])


def _measure(workshop: Workshop, number: int) -> StageEstimate:
    stage = workshop.recipe.stages[number]
    start = time.perf_counter()
    batches = workshop.schedule.batches(number, 0)
    positions = workshop.starts(batches, workshop.teacher.texts(batches))
    start_s, seconds = time.perf_counter() - start, []
    for _ in range(min(MEASURED_STEPS, len(positions[0].sigmas_T) - 1)):
        begin = time.perf_counter()
        _, positions = train_step(positions, workshop.flow, workshop.learner, OBJECTIVES[stage.objective])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    # The first step of a size is slower: memory is being got, kernels are being chosen.
    settled = seconds[1:] or seconds
    shared_s = start_s / workshop.recipe.sampling.steps
    return StageEstimate(stage.name, stage.steps, sum(settled) / len(settled) + shared_s, start_s, memory_mb())


def _memory_lines(workshop: Workshop) -> list[str]:
    need, device = workshop.need, workshop.flow.device
    total = comfy.model_management.get_total_memory(device)
    sums = [f"{need.whole / GB:.2f} GB in all, {total / GB:.2f} GB are there."]
    if need.offload:
        teacher = held_bytes(workshop.teacher.clip.cond_stage_model)
        sums.append(
            f"{need.least / GB:.2f} GB with all that ComfyUI can leave in RAM left there, "
            f"where the diffusion model takes {need.held / GB:.2f} GB and teacher and CLIP-L {teacher / GB:.2f} GB."
        )
    return [f"Memory on {device} by part, reckoned for stage {need.stage}:", *part_lines(need.parts), *(f"  {line}" for line in sums)]


def _stage_lines(recipe: Recipe, stages: list[StageEstimate]) -> list[str]:
    lines = [f"{'Stage':<24}{'steps':>9}{'s/step':>9}{'hours':>9}   measured memory"]
    for stage in stages:
        memory = ", ".join(f"{name} {value:,.0f}" for name, value in stage.memory_mb.items())
        lines.append(f"{stage.name:<24}{stage.steps:>9,}{stage.step_s:>9.2f}{stage.hours:>9.2f}   {memory}")
    total = sum(stage.hours for stage in stages)
    return [*lines, f"{'all':<24}{sum(stage.steps for stage in recipe.stages):>9,}{'':>9}{total:>9.2f}   without validation and previews"]


def _disk_lines(workshop: Workshop) -> list[str]:
    weights = sum(weight.numel() for weight in workshop.student.parameters())
    # The best one beside the last ones, and one that is being written.
    kept = workshop.recipe.checkpoints.keep_last + 2
    size_gb = weights * BYTES_PER_SAVED_WEIGHT / 1e9
    return [
        f"Disk: {kept * size_gb:.2f} GB for at most {kept} checkpoints of {size_gb:.2f} GB, {weights * 4 / 1e9:.2f} GB for the encoder."
    ]
