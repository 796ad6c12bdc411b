"""What may change when a run is resumed: the steps of its stages, and what does not affect the student.

That is the images made while it trains, and the folder of the teacher's texts.
"""

from __future__ import annotations

import time
from typing import Any

from ..runtime.lock import RunError
from .recipe import Recipe


def differences_besides_lengths(present: Recipe, requested: Recipe) -> list[str]:
    """What differs between two recipes if anything besides the steps of their stages, `preview` and a cache's folder does, else nothing."""
    # Previews may load the diffusion model for a run that does without it otherwise, and then its held-out loss is another.
    if len(present.stages) == len(requested.stages) and present.needs_diffusion_model == requested.needs_diffusion_model:
        steps = zip(requested.stages, present.stages, strict=True)
        stages = tuple(asked.model_copy(update={"steps": stage.steps}) for asked, stage in steps)
        alike = {"stages": stages, "preview": present.preview}
        cached = present.teacher.cache and requested.teacher.cache
        there = requested.with_cache(present.teacher.cache) if cached else requested
        if not present.differences(there.model_copy(update=alike)):
            return []
    return present.differences(requested)


def change_of_lengths(present: Recipe, requested: Recipe, step: int) -> dict[str, Any]:
    """The note about what `requested` changes after `step` optimizer steps.

    Raises RunError for a stage that is over, and for fewer steps than have been taken.
    """
    changes, begin = [], 0
    for stage, asked in zip(present.stages, requested.stages, strict=True):
        if asked.steps != stage.steps:
            _check(stage.name, asked.steps, step - begin, stage.steps)
            changes.append(f"{stage.name}: {stage.steps:,} -> {asked.steps:,} steps")
        begin += stage.steps
    changes += present.differences(present.model_copy(update={"preview": requested.preview, "teacher": requested.teacher}))
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "step": step,
        "changes": changes,
        "recipe_sha256_before": present.sha256,
        "recipe_sha256": requested.sha256,
    }


def _check(name: str, asked: int, taken: int, steps: int) -> None:
    if taken > steps:
        raise RunError(
            f"Stage {name} is over: its length can no longer change (expected {steps:,} steps, got {asked:,}).",
            f"give it {steps:,} steps again, and change the stage that the run is in or a later one.",
        )
    if asked < taken:
        raise RunError(
            f"{taken:,} steps of stage {name} have been taken: expected at least as many, got {asked:,}.",
            f"give it {taken:,} steps or more; with {taken:,} the run goes on to the next stage, or ends.",
        )
