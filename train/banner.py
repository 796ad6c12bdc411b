"""What a run is, in a few lines: shown when it starts, in the log, and on its page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..encoder.needed_tensors import CLIPS
from .recipe import Recipe, Stage
from .run_directory import RunDirectory
from .workshop import Workshop


def facts_of(workshops: Sequence[Workshop], run: RunDirectory | None) -> dict[str, str]:
    """Recipe, teacher, students, diffusion model, stages, folder and how to watch, each in a line."""
    workshop, step = workshops[0], workshops[0].learner.step
    recipe, total = workshop.recipe, workshop.schedule.total_steps
    name = recipe.name if len(workshops) == 1 else workshop.schedule.recipe.name
    facts = {
        "Recipe": f"{name}, {total:,} steps" + (f", continued at step {step:,}" if step else ""),
        "Teacher": _teacher(recipe),
    }
    facts |= {f"Student {one.learner.name}".rstrip(): _student(one) for one in workshops}
    facts["Diffusion model"] = f"{Path(recipe.diffusion_model.file).name} ({recipe.family.display_name})" + (
        f" on {workshop.model.device}" if recipe.needs_diffusion_model else ", not loaded"
    )
    facts |= {f"Stage {number}": _stage(stage) for number, stage in enumerate(recipe.stages, start=1)}
    if run is not None:
        watch = f'"{sys.executable}" "{Path(__file__).parent}" watch "{run.path}"'
        facts |= {"Folder": str(run.path), "Watch": f"open page.html in that folder, or: {watch}"}
    return facts


def _student(workshop: Workshop) -> str:
    layout, start = workshop.student.layout, Path(workshop.recipe.student.start).name
    return f"{layout.size_name}, {layout.parameters / 1e6:,.1f} million parameters, from {start}"


def _teacher(recipe: Recipe) -> str:
    given = recipe.teacher.companions
    names = recipe.family.companions
    beside = [f"with {Path(given[name]).name}" if name in given else f"without {CLIPS[name].display_name}" for name in names]
    cached = [f"its texts in {recipe.teacher.cache}"] if recipe.teacher.cache else []
    return ", ".join([Path(recipe.teacher.t5).name, *beside, *cached])


def _stage(stage: Stage) -> str:
    prompts = stage.batch * stage.accumulate
    return f"{stage.name}: {stage.steps:,} steps of {prompts} prompts, {stage.what} objective, {stage.resolution_px} px"
