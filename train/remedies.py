"""Changes of a recipe that lower the memory of its run, rehearsed before they are advised."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..runtime.errors import UserError
from .memory import GB
from .recipe import RANDOM, Recipe, Stage

FP8, CACHE = "fp8_e4m3fn", "teacher-cache"
# Where changes cannot be rehearsed.
GENERAL = "lower batch and raise accumulate by the same factor, or lower resolution_px or the longest of sampling.token_lengths."


def smaller(recipe: Recipe, teacher_beside: bool = False) -> Iterator[Recipe]:
    """The recipe with more and more changes, the least harmful first.

    The same result more slowly; fewer students at once, which stay the same; the diffusion model in fp8; shorter prompts; smaller
    images; a smaller student. teacher_beside: the teacher takes memory of the student's training, unless its texts are on disk.
    """
    if not recipe.diffusion_model.checkpoint_blocks:
        yield (recipe := _changed(recipe, "diffusion_model", checkpoint_blocks=True))
    if teacher_beside and not recipe.teacher.cache:
        yield (recipe := recipe.with_cache(CACHE))
    while any(stage.batch > 1 for stage in recipe.stages):
        yield (recipe := _in_stages(recipe, _half_batch))
    while len(recipe.students) > 1:
        yield (recipe := recipe.model_copy(update={"students": recipe.students[:-1]}))
    if recipe.diffusion_model.dtype != FP8:
        yield (recipe := _changed(recipe, "diffusion_model", dtype=FP8))
    lengths = recipe.sampling.token_lengths
    half = max(2, max(lengths) // 2)
    yield (recipe := _changed(recipe, "sampling", token_lengths=tuple(length for length in lengths if length <= half) or (half,)))
    yield (recipe := _in_stages(recipe, lambda stage: {"resolution_px": max(recipe.family.least_side_px, _half_side(stage))}))
    sizes, size = recipe.student_kind.sizes, recipe.student.size
    for name in reversed(sizes[: sizes.index(size)] if size else ()):
        start = recipe.student.start if recipe.student.start == RANDOM else _of_size(recipe.student.start, recipe.student.size or "", name)
        smaller_one = recipe.student.model_copy(update={"size": name, "start": start})
        yield (recipe := recipe.model_copy(update={"students": (smaller_one,)}))


def with_less_ram(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe with changes that lower the RAM beside a GPU.

    Fewer of the teacher's embeddings at once; all of them on disk, so that its weights and the diffusion model's are not there at once; the
    diffusion model in fp8.
    """
    if not recipe.teacher.cache:
        yield _changed(recipe, "teacher", chunk_prompts=1)
        yield (recipe := recipe.with_cache(CACHE))
    if recipe.diffusion_model.dtype != FP8:
        yield _changed(recipe, "diffusion_model", dtype=FP8)


def _changed(recipe: Recipe, part: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={part: getattr(recipe, part).model_copy(update=values)})


def _in_stages(recipe: Recipe, change: Callable[[Stage], Mapping[str, int]]) -> Recipe:
    return recipe.model_copy(update={"stages": tuple(stage.model_copy(update=change(stage)) for stage in recipe.stages)})


def _half_batch(stage: Stage) -> Mapping[str, int]:
    """Half of the batch or less, and as many prompts per step as before."""
    batch = next(size for size in range(max(1, stage.batch // 2), 0, -1) if stage.batch % size == 0)
    return {"batch": batch, "accumulate": stage.accumulate * stage.batch // batch}


def _of_size(start: str, size: str, other: str) -> str:
    """The name of a pretrained model of another size, spelled as this one: Qwen3-1.7B, Qwen3-0.6B."""
    return re.sub(re.escape(size), lambda found: other.upper() if found[0].isupper() else other, start, flags=re.IGNORECASE)


def _half_side(stage: Stage) -> int:
    return -(-stage.resolution_px // 32) * 16


def fitting(recipe: Recipe, candidates: Sequence[Recipe], needed: Callable[[Recipe], int], limit_bytes: int) -> str:
    """What to do for a run that takes no more than so many bytes: the first of the candidates that does, and what others take.

    needed: the bytes of a candidate; each takes less than the one before it, so that few are asked.
    """
    found: dict[int, int] = {}

    def fits(place: int) -> bool:
        found[place] = needed(candidates[place])
        return found[place] <= limit_bytes

    try:
        first = bisect.bisect_left(range(len(candidates)), True, key=fits)
    except UserError:
        return GENERAL
    lines = [_line(recipe, candidates[place], found[place], limit_bytes) for place in sorted(found) if place <= first]
    if first < len(candidates):
        how = "in the recipe's file" if len(candidates[first].students) < len(recipe.students) else "(--set KEY=VALUE)"
        return "\n".join([f"make these changes {how}, as rehearsed:", *lines])
    return "\n".join(["use a machine with more memory; no change of the recipe is enough, as rehearsed:", *lines])


def _line(recipe: Recipe, candidate: Recipe, needed: int, limit_bytes: int) -> str:
    fits = "fits" if needed <= limit_bytes else "does not fit"
    return f"  {needed / GB:.1f} GB, {fits}: {'; '.join(_changes(recipe, candidate))}"


def _changes(recipe: Recipe, candidate: Recipe) -> list[str]:
    """What differs, key by key, in all but the students that the candidate lacks."""
    kept = recipe.model_copy(update={"students": recipe.students[: len(candidate.students)]})
    fewer = [f"train fewer students: keep {', '.join(kept.student_names)}"] if kept != recipe else []
    return [*fewer, *kept.differences(candidate)]
