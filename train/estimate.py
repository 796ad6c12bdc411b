"""What a run will take, before it is started: memory by part, seconds per step, hours per stage, disk. From three measured steps."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .distill import train_step
from .objectives import OBJECTIVES
from .ranks import Ranks
from .recipe import Recipe
from .report import memory_mb
from .run import Workshop, open_workshop
from .velocity import differentiable

MEASURED_STEPS = 3
# AdamW keeps two numbers per weight; a checkpoint holds them and the weight, in float32.
BYTES_PER_TRAINED_WEIGHT, BYTES_PER_SAVED_WEIGHT = 4 + 4 + 8, 4 + 8


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


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def _memory_lines(workshop: Workshop) -> list[str]:
    recipe, weights = workshop.recipe, sum(weight.numel() for weight in workshop.student.parameters())
    longest, widest = max(recipe.sampling.token_lengths), max(stage.batch * stage.accumulate for stage in recipe.stages)
    parts = {
        "diffusion model, frozen": _megabytes(workshop.flow.model.parameters()),
        "teacher and CLIP-L, only while prompts are encoded": _megabytes(workshop.teacher.clip.cond_stage_model.parameters()),
        f"student, gradients and AdamW ({weights / 1e6:.1f} M weights)": weights * BYTES_PER_TRAINED_WEIGHT / 1e6,
        "teacher's embeddings of one trajectory": widest * longest * workshop.flow.text_width * 4 / 1e6,
    }
    return [f"Memory by part ({workshop.flow.device}):", *(f"  {name:<60}{size:>10,.0f} MB" for name, size in parts.items())]


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
