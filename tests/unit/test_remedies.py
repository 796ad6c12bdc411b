"""Changes of a recipe that lower its memory: their order, and what is advised of them."""

from __future__ import annotations

import itertools

import pytest
from distilled_t5.config.files import SHIPPED
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.remedies import fitting, smaller, with_less_ram

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))


def changes(recipe: Recipe) -> list[list[str]]:
    """What each candidate changes in addition to the one before it."""
    candidates = [recipe, *smaller(recipe)]
    return [before.differences(after) for before, after in itertools.pairwise(candidates)]


def halved(stage: int, batch: int, accumulate: int) -> list[str]:
    return [f"stage.{stage}.batch: {batch} -> {batch // 2}", f"stage.{stage}.accumulate: {accumulate} -> {2 * accumulate}"]


def test_the_least_harmful_changes_come_first():
    recipe = load_recipe("flux-dev-large", ["diffusion_model.checkpoint_blocks=false", "stage.1.batch=2", "stage.1.accumulate=16"])
    first, *halves, fp8, tokens, pixels, base, small = changes(recipe)
    assert first == ["diffusion_model.checkpoint_blocks: false -> true"]
    assert halves == [
        [*halved(0, 4, 8), *halved(1, 2, 16), *halved(2, 4, 8)],
        [*halved(0, 2, 16), *halved(2, 2, 16)],
    ]
    assert fp8 == ['diffusion_model.dtype: "bf16" -> "fp8_e4m3fn"']
    assert tokens == ["sampling.token_lengths: [77, 128, 256, 512] -> [77, 128, 256]"]
    assert pixels == [
        "stage.0.resolution_px: 512 -> 256",
        "stage.1.resolution_px: 1024 -> 512",
        "stage.2.resolution_px: 512 -> 256",
    ]
    assert base == ['student.size: "large" -> "base"', 'student.start: "flan-t5-large" -> "flan-t5-base"']
    assert small == ['student.size: "base" -> "small"', 'student.start: "flan-t5-base" -> "flan-t5-small"']


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_is_a_valid_recipe_with_as_many_prompts_per_step(name):
    recipe = load_recipe(name)
    for changed in (*smaller(recipe), *with_less_ram(recipe)):
        assert Recipe.model_validate(changed.model_dump(by_alias=True, exclude_none=True)) == changed
        assert [stage.batch * stage.accumulate for stage in changed.stages] == [stage.batch * stage.accumulate for stage in recipe.stages]
        assert recipe.differences(changed)


def test_fewer_students_are_advised_before_anything_that_changes_a_student():
    batches, students, dtype, *_ = changes(load_recipe("smoke-two-students"))
    assert batches == [*halved(0, 2, 2), *halved(1, 2, 2)]
    assert students == ['student: ["wide", "narrow"] -> ["wide"]']
    assert dtype == ['diffusion_model.dtype: "fp32" -> "fp8_e4m3fn"']


def test_of_fewer_students_those_that_stay_are_named_with_what_changes_in_them():
    recipe = load_recipe("smoke-two-students")
    alone = recipe.model_copy(update={"students": recipe.students[:1], "seed": 5})
    changed = alone.model_copy(update={"students": (alone.student.model_copy(update={"dropout": 0.5}),)})
    said = fitting(recipe, [changed], lambda _: 10**9, 10**9)
    assert said.splitlines() == [
        "make these changes in the recipe's file, as rehearsed:",
        "  1.0 GB, fits: train fewer students: keep wide; seed: 0 -> 5; student.dropout: 0.0 -> 0.5",
    ]


def test_the_start_of_a_smaller_student_is_spelled_as_its_folder():
    recipe = load_recipe("z-image-overnight-24gb", ["student.size=1.7b", "student.start=Qwen3-1.7B"])
    assert changes(recipe)[-1] == ['student.size: "1.7b" -> "0.6b"', 'student.start: "Qwen3-1.7B" -> "Qwen3-0.6B"']


def test_a_batch_that_is_odd_is_divided_by_its_least_divisor():
    recipe = load_recipe("smoke", ["stage.0.batch=9", "stage.0.accumulate=1", "stage.1.batch=1"])
    sizes = [(candidate.stages[0].batch, candidate.stages[0].accumulate) for candidate in smaller(recipe)]
    assert [*dict.fromkeys(sizes)][-2:] == [(3, 3), (1, 9)]


@pytest.mark.parametrize("limit_gb", range(1, 9))
def test_the_first_change_that_fits_is_advised_with_its_bytes_and_few_are_rehearsed(limit_gb):
    recipe = load_recipe("flux-dev-paper")
    candidates = [*smaller(recipe)]
    sizes = [(7 - place) * 10**9 for place in range(len(candidates))]
    asked: list[int] = []

    def needed(candidate: Recipe) -> int:
        asked.append(candidates.index(candidate))
        return sizes[asked[-1]]

    said = fitting(recipe, candidates, needed, limit_gb * 10**9)
    assert len(asked) <= len(candidates).bit_length()
    first = next((place for place, size in enumerate(sizes) if size <= limit_gb * 10**9), None)
    lines = said.splitlines()
    if first is None:
        assert lines[0].startswith("use a machine with more memory; no change of the recipe is enough")
        assert lines[-1] == f"  {sizes[-1] / 1e9:.1f} GB, does not fit: {'; '.join(recipe.differences(candidates[-1]))}"
    else:
        assert lines[0] == "make these changes (--set KEY=VALUE), as rehearsed:"
        assert lines[-1] == f"  {sizes[first] / 1e9:.1f} GB, fits: {'; '.join(recipe.differences(candidates[first]))}"
        assert all(", does not fit: " in line for line in lines[1:-1])


def test_ram_is_lowered_by_fewer_embeddings_first_then_by_a_cache_and_then_by_fp8():
    recipe = load_recipe("flux-dev-paper")
    first, second, third = with_less_ram(recipe)
    assert recipe.differences(first) == ["teacher.chunk_prompts: 256 -> 1"]
    assert recipe.differences(second) == ['teacher.cache: not set -> "teacher-cache"', 'teacher.cache_format: not set -> "bf16"']
    assert second.differences(third) == ['diffusion_model.dtype: "bf16" -> "fp8_e4m3fn"']
    assert [*with_less_ram(load_recipe("flux-overnight-24gb"))] == []


def test_a_cache_is_advised_where_the_teacher_takes_memory_of_the_training():
    recipe = load_recipe("schnell-24gb")
    first = next(smaller(recipe, teacher_beside=True))
    assert recipe.differences(first)[0] == 'teacher.cache: not set -> "teacher-cache"'
    assert next(smaller(first, teacher_beside=True)).teacher == first.teacher
