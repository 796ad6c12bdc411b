"""What parts of a recipe must fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..encoder.metadata import alike
from ..runtime.comfyui import NO_FILE
from ..students import KINDS
from .objectives import OBJECTIVES

if TYPE_CHECKING:
    from .recipe import Recipe, Stage


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError that names the key whose value does not fit the others."""
    _check_students(recipe)
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        raise ValueError(f"expected a different name for every stage, got {', '.join(names)}")
    for stage in recipe.stages:
        recipe.family.check_side(stage.resolution_px)
        _check_objective(recipe, stage)
    if not set(recipe.output.also_serves) <= set(alike(recipe.family)):
        possible = ", ".join(alike(recipe.family)) or "none"
        raise ValueError(f"output.also_serves: expected families with the teacher and padding of {recipe.family.name} ({possible})")
    for name in recipe.teacher.companions:
        if name not in recipe.family.companions:
            raise ValueError(f'teacher.{name}: expected "{NO_FILE}", as {recipe.family.display_name} takes none')
    steps, warmup_steps = min(recipe.periods), recipe.optimizer.warmup_steps
    if warmup_steps > steps:
        whose = "shortest stage" if recipe.optimizer.restart_per_stage else "run"
        raise ValueError(f"optimizer.warmup_steps: expected at most the {steps} steps of the {whose}, got {warmup_steps}")


def _check_students(recipe: Recipe) -> None:
    names = [student.name for student in recipe.students]
    if len(names) > 1 and None in names:
        raise ValueError(f"student.{names.index(None)}.name is missing: each of several students needs a name")
    # They name folders, and some file systems do not tell A from a.
    if len({str(name).lower() for name in names}) < len(names):
        raise ValueError(f"expected a different name for every student, got {', '.join(map(str, names))}")
    family = recipe.family
    for key, student in zip(recipe.student_keys, recipe.students, strict=True):
        if not any(student.is_of(KINDS[name]) for name in family.students):
            kinds = " or ".join(KINDS[name].display_name for name in family.students)
            got = next(kind.display_name for kind in KINDS.values() if student.is_of(kind))
            raise ValueError(f"{key}: expected a {kinds}, which {family.display_name} can use, got a {got}")


def _check_objective(recipe: Recipe, stage: Stage) -> None:
    """Raise ValueError for an objective about what the family's models lack."""
    family, streams = recipe.family, {each for returned in recipe.family.block_lists.values() for each in "+".join(returned).split("+")}
    has = {"projection": family.text_projection, "keys_values": family.keys_values, "text_stream": "text" in streams}
    if not has.get(OBJECTIVES[stage.objective].at, True):
        raise ValueError(
            f"stage {stage.name}: expected an objective that {family.display_name} has, got {stage.objective}; "
            "early and velocity fit every family"
        )
