"""The sequence of an overnight recipe, from the cache to its last stage, on the small models of `smoke`: seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distilled_t5.train.recipe import Recipe, load_recipe

# Imitate, follow early, follow.
STEPS = (40, 8, 4)
BOUNDARIES = (40, 48)
SETTINGS = [
    "sampling.steps=2",
    "validation.prompts=3",
    "validation.every_steps=20",
    "checkpoints.every_steps=1",
    "checkpoints.keep_last=99",
    "student.dropout=0.1",
]
# The small Flux has two, and no stream of the text after the last one.
BLOCKS = 1


def small_overnight(cache: Path | str, steps: Sequence[int] = STEPS, *more: str) -> Recipe:
    """The recipe; its texts are more than one shard."""
    small, shipped = load_recipe("smoke", [*SETTINGS, f"teacher.cache={cache}", *more]), load_recipe("flux-overnight-24gb")
    assert [stage.objective for stage in shipped.stages] == ["projected", "early", "velocity"]
    kept = ("name", "objective")
    stages = tuple(
        small.stages[0].model_copy(
            update={"steps": count, "blocks": min(stage.blocks, BLOCKS), **{key: getattr(stage, key) for key in kept}}
        )
        for count, stage in zip(steps, shipped.stages, strict=True)
    )
    return small.model_copy(update={"stages": stages})
