"""Runs that keep their teacher's texts in a cache, and what must be equal of two of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.ranks import Ranks
from ...train.batches import Schedule
from ...train.cache_plan import wanted
from ...train.recipe import Recipe, load_recipe
from ...train.state import read_checkpoint
from ...train.teacher_cache import CachedTexts, open_cache
from .exact import same
from .trainer import metrics

STEPS = 11
SETTINGS = [
    "stage.0.steps=2",
    "stage.1.steps=9",
    "sampling.steps=2",
    "validation.prompts=3",
    "validation.every_steps=4",
    "checkpoints.every_steps=50",
    "student.dropout=0.1",
]


class StopAfter:
    """A request to stop that comes when it was asked for so many times: once after each step."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def recipe(cache: Path, *more: str) -> Recipe:
    return load_recipe("smoke", [*SETTINGS, f"teacher.cache={cache}", *more])


def made(one: Recipe, stopping: Any = lambda: False) -> CachedTexts:
    return open_cache(one, wanted(Schedule(one)), Ranks(), stopping)


def shards_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def texts_in(cache: CachedTexts, keys: Sequence[str]) -> dict[str, Any]:
    return {key: dict(sorted(cache.shards.read(key).items())) for key in keys}


PARTS = ("student", "optimizer", "position", "best")


def check_same_run(run: Path, other: Path, parts: Sequence[str] = (*PARTS, "rng")) -> None:
    ours, theirs = (read_checkpoint(folder / "checkpoints" / f"step-{STEPS:06d}") for folder in (run, other))
    for part in parts:
        assert same(getattr(ours, part), getattr(theirs, part)), part
    assert [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in metrics(run)] == [
        (line["step"], line.get("loss"), line.get("held_out_loss")) for line in metrics(other)
    ]
