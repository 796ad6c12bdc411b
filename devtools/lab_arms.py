"""The arms of the lab, benchmarks/lab.toml: the stages that a student is trained with, and the arithmetic that they take."""

from __future__ import annotations

import functools
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config.toml import toml_value
from ..runtime.disk import replace_file
from ..train.recipe import Recipe, Stage, load_recipe
from .commands import ROOT

ARMS = ROOT / "benchmarks" / "lab.toml"
# A file that an arm may start from: a T5 of the student's size, pretrained on text alone.
PRETRAINED = "{pretrained}"
FAMILIES = ("flux", "sd3")
# Any number that the warm-up does not exceed: a step takes what it takes in a run of any length.
COUNTED_STEPS = 1000
# Floating-point operations of a step of each stage of a recipe, with the teacher's.
Count = Callable[[Recipe], Sequence[float]]


@dataclass(frozen=True)
class Arm:
    """Stages as tables of a recipe: what they leave out is as in the first stage of the base recipe.

    times: the arithmetic, as a multiple of that of the first arm; the stages' steps are then proportions. tflop: the arithmetic of a
    planned arm, 10^12 operations.
    """

    name: str
    title: str
    stages: tuple[Mapping[str, Any], ...]
    settings: tuple[str, ...] = ()
    families: tuple[str, ...] = FAMILIES
    times: float | None = None
    tflop: float = 0.0

    def overrides(self, recipe: str, common: Sequence[str], seed: int, pretrained: Path) -> tuple[str, ...]:
        """The values of `--set` with which the trainer's command trains this arm from a shipped recipe."""
        stages = [_first_stage(recipe) | {"name": f"{number}-{stage['objective']}", **stage} for number, stage in enumerate(self.stages, 1)]
        own = (setting.replace(PRETRAINED, pretrained.as_posix()) for setting in self.settings)
        return (f"seed={seed}", f"output.name={self.name}", *common, *own, f"stage={toml_value(stages)}")

    def steps(self) -> str:
        """Its stages in words."""
        return ", ".join(f"{stage['steps']:,} {stage['objective']}{_blocks(stage)}" for stage in self.stages)

    def shortened(self, steps: int) -> Arm:
        """The arm with so many steps in every stage."""
        return replace(self, stages=tuple({**stage, "steps": steps} for stage in self.stages))


@functools.cache
def _first_stage(recipe: str) -> dict[str, Any]:
    return load_recipe(recipe).stages[0].model_dump(exclude_none=True)


def _blocks(stage: Mapping[str, Any]) -> str:
    return f" ({stage['blocks']})" if "blocks" in stage else ""


@dataclass(frozen=True)
class Lab:
    """The arms of one family, the first of which is the base, and the questions that pairs of them answer."""

    family: str
    recipe: str
    suite: str
    settings: tuple[str, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Mapping[str, str], ...]

    @classmethod
    def read(cls, family: str, path: Path = ARMS) -> Lab:
        """The arms of a family, in the order in which they are trained; an arm with several `times` becomes several."""
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        arms = tuple(arm for table in found["arm"] for arm in _arms(table) if family in arm.families)
        return cls(family, **found["family"][family], settings=tuple(found["settings"]), arms=arms, claims=tuple(found["claim"]))

    def load(self, arm: Arm, seed: int, pretrained: Path) -> Recipe:
        """The recipe of a run."""
        return load_recipe(self.recipe, arm.overrides(self.recipe, self.settings, seed, pretrained))

    def planned(self, count: Count) -> Lab:
        """The lab with the arithmetic of every arm, and the steps of those that are to take a multiple of the base's."""
        alike: dict[tuple[str, ...], list[Arm]] = {}
        for arm in self.arms:
            alike.setdefault(tuple(setting for setting in arm.settings if PRETRAINED not in setting), []).append(arm)
        per_step: dict[str, list[float]] = {}
        for settings, arms in alike.items():
            stages = tuple({**stage, "steps": COUNTED_STEPS} for arm in arms for stage in arm.stages)
            counted = iter(count(self.load(Arm("counted", "counted", stages, settings), 0, Path())))
            per_step |= {arm.name: [next(counted) for _ in arm.stages] for arm in arms}
        base = _tflop(self.arms[0], per_step[self.arms[0].name])
        return replace(self, arms=tuple(_scaled(arm, per_step[arm.name], base) for arm in self.arms))


def _arms(table: Mapping[str, Any]) -> list[Arm]:
    times = table.get("times", [None])
    names = [table["name"] if number is None else f"{table['name']}-{number:g}" for number in times]
    settings, families = tuple(table.get("settings", ())), tuple(table.get("families", FAMILIES))
    arm = Arm("", table["title"], tuple(table["stages"]), settings, families)
    return [replace(arm, name=name, times=number) for name, number in zip(names, times, strict=True)]


def _tflop(arm: Arm, per_step: Sequence[float]) -> float:
    return sum(stage["steps"] * flops for stage, flops in zip(arm.stages, per_step, strict=True)) / 1e12


def _scaled(arm: Arm, per_step: Sequence[float], base_tflop: float) -> Arm:
    factor = 1.0 if arm.times is None else arm.times * base_tflop / _tflop(arm, per_step)
    scaled = replace(arm, stages=tuple({**stage, "steps": max(1, round(factor * stage["steps"]))} for stage in arm.stages))
    return replace(scaled, tflop=_tflop(scaled, per_step))


class Counted:
    """Counts the operations of stages by a rehearsal, once for equal stages, settings and sources of the pack."""

    def __init__(self, file: Path, start_comfyui: Callable[[], object]) -> None:
        self.file, self._start_comfyui = file, start_comfyui
        self._known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def __call__(self, recipe: Recipe) -> list[float]:
        """The operations of a step of each stage."""
        keys = [_key(recipe, stage) for stage in recipe.stages]
        if missing := {key: stage for key, stage in zip(keys, recipe.stages, strict=True) if key not in self._known}:
            print(f"Counting the operations of a step of {len(missing)} stages", flush=True)
            found = self._rehearsed(recipe.model_copy(update={"stages": tuple(missing.values())}))
            self._known |= dict(zip(missing, found, strict=True))
            replace_file(self.file, json.dumps(self._known, indent=1).encode())
        return [self._known[key] for key in keys]

    def _rehearsed(self, recipe: Recipe) -> list[float]:
        self._start_comfyui()
        import torch

        from ..train.models import rehearsal_of

        stages = rehearsal_of(recipe, torch.device("cpu"), with_time=True).stages
        return [sum(stage.flops.values()) + sum(stage.teacher_flops.values()) for stage in stages]


def _key(recipe: Recipe, stage: Stage) -> str:
    from ..evaluate.provenance import sources_sha256

    alone = recipe.model_copy(update={"stages": (stage.model_copy(update={"name": "counted"}),)})
    return hashlib.sha256((sources_sha256() + alone.to_toml()).encode()).hexdigest()
