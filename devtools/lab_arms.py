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
from ..train.recipe import Recipe, load_recipe
from .commands import ROOT

ARMS = ROOT / "benchmarks" / "lab.toml"
# What settings of arms name in braces: in student.start a T5 of the student's size, pretrained on text alone; in teacher.cache the folder
# that all runs share.
PRETRAINED, TEXTS = "pretrained", "texts"
START, NAMED = f"student.start={{{PRETRAINED}}}", re.compile(r"\{(\w+)\}$")
FAMILIES = ("flux", "sd3")


@dataclass(frozen=True)
class Arm:
    """Stages as tables of a recipe: what they leave out is as in the first stage of the base recipe.

    tflop: the arithmetic of a planned arm, 10^12 operations, with the pretraining of what it starts from; captions: how many it draws.
    """

    name: str
    title: str
    stages: tuple[Mapping[str, Any], ...]
    settings: tuple[str, ...] = ()
    families: tuple[str, ...] = FAMILIES
    tflop: float = 0.0
    captions: int = 0

    @property
    def pretrained(self) -> bool:
        """Whether it starts from a pretrained T5; else from random weights."""
        return START in self.settings

    def overrides(self, recipe: str, common: Sequence[str], seed: int, files: Mapping[str, Path]) -> tuple[str, ...]:
        """The values of `--set` with which the trainer trains this arm from a shipped recipe. `files`: what `{NAME}` stands for."""
        stages = [_first_stage(recipe) | {"name": f"{number}-{stage['objective']}", **stage} for number, stage in enumerate(self.stages, 1)]
        own = (NAMED.sub(lambda found: files[found[1]].as_posix(), setting) for setting in self.settings)
        return (f"seed={seed}", f"output.name={self.name}", *common, *own, f"stage={toml_value(stages)}")

    def steps(self) -> str:
        """Its stages in words."""
        return ", ".join(f"{stage['steps']:,} {stage['objective']}{_details(stage)}" for stage in self.stages)

    def shortened(self, steps: int) -> Arm:
        """The arm with so many steps in every stage."""
        return replace(self, stages=tuple({**stage, "steps": steps} for stage in self.stages))


@functools.cache
def _first_stage(recipe: str) -> dict[str, Any]:
    return load_recipe(recipe).stages[0].model_dump(exclude_none=True)


def _details(stage: Mapping[str, Any]) -> str:
    details = [str(stage["blocks"])] if "blocks" in stage else []
    details += [f"batches of {stage['batch']}"] if "batch" in stage else []
    return f" ({', '.join(details)})" if details else ""


@dataclass(frozen=True)
class Lab:
    """The arms of one family, the first of which is the base, and the questions that pairs of them answer.

    shipped: the student of the pack that the base's recipe has trained with its first seed; it is not trained again.
    """

    family: str
    recipe: str
    suite: str
    settings: tuple[str, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Mapping[str, str], ...]
    shipped: str = ""

    @classmethod
    def read(cls, family: str, path: Path = ARMS) -> Lab:
        """The arms of a family, in the order in which they are trained."""
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(
            family,
            **found["family"][family],
            settings=tuple(found["settings"]),
            arms=tuple(arm for arm in map(_arm, found["arm"]) if family in arm.families),
            claims=tuple(found["claim"]),
        )

    def load(self, arm: Arm, seed: int, files: Mapping[str, Path]) -> Recipe:
        """The recipe of a run."""
        return load_recipe(self.recipe, arm.overrides(self.recipe, self.settings, seed, files))

    def planned(self, tflop: Callable[[Recipe], float], pretraining_tflop: Callable[[], float]) -> Lab:
        """The lab with the arithmetic and the captions of every arm."""
        before = pretraining_tflop() if any(arm.pretrained for arm in self.arms) else 0.0
        planned = []
        for arm in self.arms:
            # What it starts from changes nothing in what its own steps take.
            own = replace(arm, settings=tuple(setting for setting in arm.settings if setting != START))
            recipe = self.load(own, 0, {TEXTS: Path(TEXTS)})
            planned.append(replace(arm, tflop=before * arm.pretrained + tflop(recipe), captions=_captions(recipe)))
        return replace(self, arms=tuple(planned))


def _arm(table: Mapping[str, Any]) -> Arm:
    settings, families = table.get("settings", ()), table.get("families", FAMILIES)
    return Arm(table["name"], table["title"], tuple(table["stages"]), tuple(settings), tuple(families))


def _captions(recipe: Recipe) -> int:
    return sum(-(-stage.steps // recipe.trajectory_steps(stage)) * stage.batch * stage.accumulate for stage in recipe.stages)


class Counted:
    """Counts the operations of runs by a rehearsal, once for equal recipes and sources of the pack."""

    def __init__(self, file: Path, start_comfyui: Callable[[], object]) -> None:
        self.file, self._start_comfyui = file, start_comfyui
        self._known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def tflop(self, recipe: Recipe) -> float:
        """The operations, 10^12, of all steps of a run, the teacher's included."""
        from ..evaluate.provenance import sources_sha256

        key = hashlib.sha256((sources_sha256() + recipe.to_toml()).encode()).hexdigest()
        return self._once(key, lambda: self._rehearsed(recipe))

    def pretraining_tflop(self, recipe: str, comfyui: Path) -> float:
        """The operations, 10^12, of the pretraining of a student."""
        from .lab_pretrain import sources, tflop

        return self._once(f"pretraining {recipe} {sources()}", lambda: tflop(recipe, comfyui))

    def _once(self, key: str, count: Callable[[], float]) -> float:
        if key not in self._known:
            self._known[key] = count()
            replace_file(self.file, json.dumps(self._known, indent=1).encode())
        return self._known[key]

    def _rehearsed(self, recipe: Recipe) -> float:
        print(f"Counting the operations of {recipe.output.name}", flush=True)
        self._start_comfyui()
        import torch

        from ..train.models import rehearsal_of

        stages = rehearsal_of(recipe, torch.device("cpu"), with_time=True).stages
        return sum(stage.steps * sum((*stage.flops.values(), *stage.teacher_flops.values())) for stage in stages) / 1e12
