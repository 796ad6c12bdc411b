"""The sequence of an overnight recipe, from the cache to its last stage, on the small models of `smoke`: seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.state import read_checkpoint

from .exact import same
from .trainer import metrics

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
# The parts of a checkpoint that do not differ between processes, as Python's and numpy's generators do, which the trainer does not use.
PARTS = ("student", "optimizer", "position", "best")
# The small Flux has two, and no stream of the text after the last one.
BLOCKS = 1


def small_overnight(cache: Path | str, steps: Sequence[int] = STEPS, *more: str) -> Recipe:
    """The recipe; its texts are more than one shard."""
    small, shipped = load_recipe("smoke", [*SETTINGS, f"teacher.cache={cache}", *more]), load_recipe("flux-overnight-24gb")
    assert [stage.objective for stage in shipped.stages] == ["projected", "early", "velocity"]
    kept = ("name", "objective", "trajectory_steps")
    stages = tuple(
        small.stages[0].model_copy(
            update={"steps": count, "blocks": min(stage.blocks, BLOCKS), **{key: getattr(stage, key) for key in kept}}
        )
        for count, stage in zip(steps, shipped.stages, strict=True)
    )
    return small.model_copy(update={"stages": stages})


def check_same_run(run: Path, other: Path, step: int) -> None:
    """Two runs have the same bits in the checkpoint of a step, and the same losses up to it."""
    ours, theirs = (read_checkpoint(folder / "checkpoints" / f"step-{step:06d}") for folder in (run, other))
    for part in PARTS:
        assert same(getattr(ours, part), getattr(theirs, part)), part
    assert [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in metrics(run)] == [
        (line["step"], line.get("loss"), line.get("held_out_loss")) for line in metrics(other)
    ]
