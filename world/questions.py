"""Questions about the miniature's world: held-out captions with the scenes that their images should show."""

from __future__ import annotations

from .captions import draw_prompt
from .pictures import Scene
from .scenes import Split

QUESTIONS_SEED = 1_000_003


def questions(task: str, count: int, split: Split = "held_out") -> list[tuple[Scene, str]]:
    """`count` scenes of a task with their captions, the same for every encoder."""
    return [draw_prompt(QUESTIONS_SEED, index, split, task) for index in range(count)]
