"""The arms of the lab, benchmarks/lab.toml: the stages that a student is trained with, and the arithmetic that they take."""

from __future__ import annotations

import functools
import hashlib
import json
import re
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
# What an arm may start from, in its value of student.start: a T5 of the student's size, pretrained on text alone, or "{NAME}", the
# student that an earlier arm has trained with the same seed.
PRETRAINED = "pretrained"
START = re.compile(r"student\.start=\{(.+)\}")
FAMILIES = ("flux", "sd3")
# Any number that the warm-up does not exceed: a step takes what it takes in a run of any length.
COUNTED_STEPS = 1000
# Floating-point operations of a step of each stage of a recipe, with the teacher's.
Count = Callable[[Recipe], Sequence[float]]


@dataclass(frozen=True)
class Arm:
    """Stages as tables of a recipe: what they leave out is as in the first stage of the base recipe.

    times: the arithmetic, as a multiple of that of the first arm; the stages' steps are then proportions. tflop: the arithmetic of a
    planned arm, 10^12 operations; captions: how many it draws. Both with those of the student that it starts from.
    """

    name: str
    title: str
    stages: tuple[Mapping[str, Any], ...]
    settings: tuple[str, ...] = ()
    families: tuple[str, ...] = FAMILIES
    times: float | None = None
    tflop: float = 0.0
    captions: int = 0

    @property
    def start(self) -> str | None:
        """What it starts from; None: random weights."""
        return next((found[1] for setting in self.settings if (found := START.fullmatch(setting))), None)

    def overrides(self, recipe: str, common: Sequence[str], seed: int, starts: Mapping[str, Path]) -> tuple[str, ...]:
        """The values of `--set` with which the trainer's command trains this arm from a shipped recipe. `starts`: files by name."""
        stages = [_first_stage(recipe) | {"name": f"{number}-{stage['objective']}", **stage} for number, stage in enumerate(self.stages, 1)]
        own = (START.sub(lambda found: f"student.start={starts[found[1]].as_posix()}", setting) for setting in self.settings)
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

    def load(self, arm: Arm, seed: int, starts: Mapping[str, Path]) -> Recipe:
        """The recipe of a run."""
        return load_recipe(self.recipe, arm.overrides(self.recipe, self.settings, seed, starts))

    def planned(self, count: Count, pretraining_tflop: Callable[[], float]) -> Lab:
        """The lab with the arithmetic of every arm, and the steps of those that are to take a multiple of the base's."""
        alike: dict[tuple[str, ...], list[Arm]] = {}
        for arm in self.arms:
            alike.setdefault(tuple(setting for setting in arm.settings if not START.fullmatch(setting)), []).append(arm)
        per_step: dict[str, list[float]] = {}
        for settings, arms in alike.items():
            stages = tuple({**stage, "steps": COUNTED_STEPS} for arm in arms for stage in arm.stages)
            counted = iter(count(self.load(Arm("counted", "counted", stages, settings), 0, {})))
            per_step |= {arm.name: [next(counted) for _ in arm.stages] for arm in arms}
        base = _tflop(self.arms[0], per_step[self.arms[0].name])
        made: dict[str, Arm] = {}
        for arm in self.arms:
            if arm.start == PRETRAINED and PRETRAINED not in made:
                made[PRETRAINED] = Arm(PRETRAINED, PRETRAINED, (), tflop=pretraining_tflop())
            before = made[arm.start] if arm.start else Arm("random", "random", ())
            scaled = _scaled(arm, per_step[arm.name], base, before.tflop)
            made[arm.name] = replace(scaled, captions=before.captions + self._captions(scaled))
        return replace(self, arms=tuple(made[arm.name] for arm in self.arms))

    def _captions(self, arm: Arm) -> int:
        recipe = self.load(arm, 0, {arm.start: Path()} if arm.start else {})
        return sum(-(-stage.steps // recipe.trajectory_steps(stage)) * stage.batch * stage.accumulate for stage in recipe.stages)


def _arms(table: Mapping[str, Any]) -> list[Arm]:
    times = table.get("times", [None])
    names = [table["name"] if number is None else f"{table['name']}-{number:g}" for number in times]
    settings, families = tuple(table.get("settings", ())), tuple(table.get("families", FAMILIES))
    arm = Arm("", table["title"], tuple(table["stages"]), settings, families)
    return [replace(arm, name=name, times=number) for name, number in zip(names, times, strict=True)]


def _tflop(arm: Arm, per_step: Sequence[float]) -> float:
    return sum(stage["steps"] * flops for stage, flops in zip(arm.stages, per_step, strict=True)) / 1e12


def _scaled(arm: Arm, per_step: Sequence[float], base_tflop: float, before_tflop: float) -> Arm:
    """The arm with its steps. `before_tflop`: what its start took, which is part of its arithmetic."""
    factor = 1.0 if arm.times is None else (arm.times * base_tflop - before_tflop) / _tflop(arm, per_step)
    if factor <= 0:
        raise ValueError(
            f"{ARMS.name}: {arm.name} starts from a student that took {before_tflop:.3g} TFLOP; expected less than "
            f"{arm.times} times the base's {base_tflop:.3g}.\nWhat to do: give it larger times."
        )
    scaled = replace(arm, stages=tuple({**stage, "steps": max(1, round(factor * stage["steps"]))} for stage in arm.stages))
    return replace(scaled, tflop=before_tflop + _tflop(scaled, per_step))


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

    def pretraining_tflop(self, recipe: str, comfyui: Path) -> float:
        """The operations, 10^12, of the pretraining of a student."""
        from .lab_pretrain import sources, tflop

        key = f"pretraining {recipe} {sources()}"
        if key not in self._known:
            self._known[key] = tflop(recipe, comfyui)
            replace_file(self.file, json.dumps(self._known, indent=1).encode())
        return self._known[key]

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
