"""What a step of each later stage will take: one forward and backward pass of it, which changes nothing of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..runtime.accelerator import timed
from ..runtime.randomness import undisturbed
from .objectives import Objective
from .recipe import Stage
from .report import reset_peak_memory
from .teacher_chunks import texts_of
from .trajectory import Position, gaps_at
from .workshop import Workshop

# The first pass of a size allocates memory and chooses kernels; the last one is measured.
PASSES = 2


def trials(workshop: Workshop) -> dict[int, float]:
    """Seconds of an optimizer step, by stage, of the stages that have not begun; all processes must call it.

    The teacher's work is divided among the steps of a trajectory. Stages of the same cost are measured once.
    """
    recipe, learner = workshop.recipe, workshop.learner
    now = workshop.schedule.place(learner.step).stage if learner.step < workshop.schedule.total_steps else len(recipe.stages)
    measured: dict[tuple[object, ...], float] = {}
    seconds: dict[int, float] = {}
    for number, stage in enumerate(recipe.stages):
        if number > now:
            if _cost_of(stage) not in measured:
                measured[_cost_of(stage)] = _trial(workshop, number)
            seconds[number] = measured[_cost_of(stage)]
    reset_peak_memory()
    return seconds


def _cost_of(stage: Stage) -> tuple[object, ...]:
    return stage.objective, stage.blocks, stage.trajectory_steps, stage.resolution_px, stage.batch, stage.accumulate


def _trial(workshop: Workshop, number: int) -> float:
    objective = workshop.objective(number)
    batches, device = workshop.schedule.batches(number, 0), workshop.model.device
    with undisturbed():
        steps = workshop.recipe.trajectory_steps(workshop.recipe.stages[number])
        encode_s, positions = timed(lambda: workshop.starts(batches, texts_of(workshop.teacher, batches), steps), device)
        first_s = _pass_s(workshop, objective, positions)
        # Only at the last step of a trajectory some objectives need no velocity.
        ends_early = objective.at == "streams"
        last_s = _pass_s(workshop, objective, [replace(one, step=steps - 1) for one in positions]) if ends_early else first_s
        for learner in workshop.learners:
            learner.optimizer.zero_grad(set_to_none=True)
    return first_s + (last_s - first_s + encode_s) / steps


def _pass_s(workshop: Workshop, objective: Objective, positions: Sequence[Position]) -> float:
    # Without their own random numbers, which stay as they are.
    students = [replace(learner, random=None).embed for learner in workshop.learners]

    def work() -> None:
        for one in positions:
            for loss_B in gaps_at(one, workshop.model, students, objective)[0]:
                loss_B.mean().backward()

    return [timed(work, workshop.model.device)[0] for _ in range(PASSES)][-1]
