"""Questions about the miniature's world: captions that no training ever showed, with the scene that the picture is to show."""

from __future__ import annotations

from .captions import draw_prompt
from .pictures import Scene
from .scenes import Split

QUESTIONS_SEED = 1_000_003


def questions(task: str, count: int, split: Split = "held_out") -> list[tuple[Scene, str]]:
    """`count` scenes of a task with their captions: the same ones for every encoder."""
    return [draw_prompt(QUESTIONS_SEED, index, split, task) for index in range(count)]
