"""Recipes made of a shipped one, the preset, and what a user chooses in the graph: models, prompts, steps, seed, name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.files import shipped_names
from ..config.parts import file_stem
from ..config.toml import toml_value
from ..families.family import Family
from ..prompts.corpora import PACK
from ..runtime.comfyui import NO_FILE
from ..runtime.errors import UserError, printable
from .recipe import Recipe, load_recipe

# How the names of shipped recipes begin that train nothing of use.
NOT_PRESETS = "smoke"
# Of a user's own prompts, one in so many is held out, at most as many as in the preset; and steps of warm-up, likewise.
SHARE = 10


@dataclass(frozen=True)
class Wishes:
    """What the graph says: model files as recipes name them, and what replaces the preset's own values.

    dtype: None for the preset's. companions: the files of CLIP-L and CLIP-G by name, without those that are absent. steps: 0 for the
    preset's. vae: None for the preset's, "" for no images. prompts: a file with a prompt on each line; None for the preset's own prompts.
    cache: folder of the teacher's texts, for presets that keep them; None for the preset's.
    """

    diffusion_model: str
    dtype: str | None
    t5: str
    companions: Mapping[str, str]
    name: str
    seed: int = 0
    steps: int = 0
    vae: str | None = None
    prompts: Path | None = None
    prompt_count: int = 0
    cache: Path | None = None


def preset_names() -> list[str]:
    """The shipped recipes that can be presets."""
    return [name for name in shipped_names() if not name.startswith(NOT_PRESETS)]


def starter_prompts() -> str:
    """The pack's general prompts, one on each line."""
    return (PACK / "prompts" / "starter.txt").read_text(encoding="utf-8").strip()


def recipe_of(preset: str, wishes: Wishes, begun: Recipe | None = None, taken: int = 0) -> Recipe:
    """The preset with these wishes; `begun` and `taken`: the recipe of a run that continues with it, and the steps that it has taken.

    Raises UserError for a number of steps that is too small, ConfigError for other values.
    """
    recipe = load_recipe(preset)
    settings = [*_model_settings(recipe, wishes), *length_settings(recipe, wishes.steps, begun, taken), *_prompt_settings(recipe, wishes)]
    return load_recipe(preset, settings)


def fitting_family(preset: str, model: Any) -> Family:
    """The family of a preset. Raises UserError with the presets that fit this loaded model if this one does not."""
    recipe = load_recipe(preset)
    if reason := _misfit(recipe, model):
        fitting = [name for name in preset_names() if _misfit(load_recipe(name), model) is None]
        raise UserError(
            f"The preset {preset} does not fit the model, which {reason}",
            f"set preset to {' or '.join(fitting)}." if fitting else "connect a model of a family that this pack knows.",
        )
    return recipe.family


def _misfit(recipe: Recipe, model: Any) -> str | None:
    """Why a recipe cannot train with a loaded model, after "which"; None if it can."""
    if reason := recipe.family.refuse(model):
        return reason
    takes_guidance = recipe.family.takes_guidance(model)
    if takes_guidance == bool(recipe.sampling.guidance):
        return None
    return "takes guidance; the preset has none." if takes_guidance else "takes no guidance; the preset has some."


def check_name(name: str) -> None:
    """Raise UserError for a name that cannot be that of a file."""
    try:
        file_stem(name)
    except ValueError as error:
        raise UserError(f"{printable(name)!r} cannot be the name of the encoder: {error}.", 'give a name such as "my_student".') from error


def _model_settings(recipe: Recipe, wishes: Wishes) -> Iterator[str]:
    values = {
        "teacher.t5": wishes.t5,
        "diffusion_model.file": wishes.diffusion_model,
        "output.name": wishes.name,
        "seed": wishes.seed,
    }
    values |= {f"teacher.{name}": wishes.companions.get(name, NO_FILE) for name in recipe.family.companions}
    if wishes.dtype is not None:
        values["diffusion_model.dtype"] = wishes.dtype
    if recipe.teacher.cache and wishes.cache:
        values["teacher.cache"] = str(wishes.cache)
    if wishes.vae is not None:
        values["preview.vae"] = wishes.vae
    return (f"{key}={toml_value(value)}" for key, value in values.items())


def length_settings(recipe: Recipe, steps: int, begun: Recipe | None = None, taken: int = 0) -> Iterator[str]:
    """For so many steps, 0 for the recipe's own: those of every stage, of warm-up and between reports, in proportion.

    A run that has begun keeps its warm-up and reports. Raises UserError for too few steps.
    """
    usual = [stage.steps for stage in recipe.stages]
    steps = steps or sum(usual)
    if begun is None and steps == sum(usual):
        return
    stages = _stage_steps(usual, steps, [stage.steps for stage in begun.stages] if begun else [], taken)
    if sum(stages) != steps:
        already = f", {taken} of which are taken" if taken else ""
        raise UserError(
            f"{steps} steps are too few for the {len(usual)} stages of the preset {recipe.name}{already}.",
            f"set steps to {sum(stages)} or more.",
        )
    yield from (f"stage.{number}.steps={stage}" for number, stage in enumerate(stages))
    shortest = min(stages) if recipe.optimizer.restart_per_stage else steps
    warmup_steps = begun.optimizer.warmup_steps if begun else min(recipe.optimizer.warmup_steps, shortest // SHARE)
    yield f"optimizer.warmup_steps={warmup_steps}"
    for part in ("validation", "checkpoints", "preview"):
        usually = getattr(recipe, part).every_steps
        every_steps = getattr(begun, part).every_steps if begun else max(1, round(usually * min(1, steps / sum(usual))))
        yield f"{part}.every_steps={every_steps}"


def _stage_steps(usual: Sequence[int], steps: int, begun: Sequence[int], taken: int) -> list[int]:
    """The steps of each stage, in the proportion of `usual`: `steps` in sum, or more if these are too few.

    Of a run with stages of `begun` steps, those that are over after `taken` steps keep their length, but the last can grow.
    """
    stages: list[int] = []
    for number, stage in enumerate(usual):
        left, later = steps - sum(stages), len(usual) - 1 - number
        least = max(1, taken - sum(stages))
        is_over = later and 0 < sum(begun[: number + 1]) <= taken
        share = round(left * stage / sum(usual[number:]))
        stages.append(begun[number] if is_over else max(least, min(share, left - later)))
    return stages


def _prompt_settings(recipe: Recipe, wishes: Wishes) -> Iterator[str]:
    """The same prompts in every stage."""
    if wishes.prompts is None:
        return
    corpora = toml_value([{"kind": "lines", "path": str(wishes.prompts)}])
    yield from (f"stage.{number}.corpora={corpora}" for number in range(len(recipe.stages)))
    yield f"validation.prompts={min(recipe.validation.prompts, max(1, wishes.prompt_count // SHARE))}"
