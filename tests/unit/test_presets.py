"""Recipes made of a shipped one and what the graph says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from distilled_t5.train.presets import Wishes, check_name, preset_names, recipe_of, starter_prompts
from distilled_t5.train.recipe import load_recipe

WISHES = Wishes("flux.safetensors", "auto", "t5.safetensors", "clip_l.safetensors", "mine")


def test_without_wishes_only_models_name_and_seed_differ_from_the_preset():
    for preset in preset_names():
        changed = {line.partition(":")[0] for line in load_recipe(preset).differences(recipe_of(preset, WISHES))}
        assert changed <= {"teacher.t5", "teacher.clip_l", "diffusion_model.file", "diffusion_model.dtype", "output.name", "seed"}


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("steps", [100, 800, 1_000_000])
def test_every_preset_becomes_shorter_or_longer_with_its_stages_in_proportion(preset, steps):
    usual, asked = load_recipe(preset), recipe_of(preset, replace(WISHES, steps=steps))
    total = sum(stage.steps for stage in usual.stages)
    assert sum(stage.steps for stage in asked.stages) == steps
    for one, other in zip(usual.stages, asked.stages, strict=True):
        assert abs(other.steps / steps - one.steps / total) < 2 / steps
    assert asked.optimizer.warmup_steps <= min(usual.optimizer.warmup_steps, steps // 10)
    for part in ("validation", "checkpoints", "preview"):
        assert 1 <= getattr(asked, part).every_steps <= getattr(usual, part).every_steps


def test_prompts_take_the_place_of_those_of_every_stage_and_one_in_ten_is_held_out(tmp_path: Path):
    recipe = recipe_of("schnell-16gb", replace(WISHES, prompts=tmp_path / 'my "best" prompts.txt', prompt_count=57))
    assert {corpus.path for stage in recipe.stages for corpus in stage.corpora} == {str(tmp_path / 'my "best" prompts.txt')}
    assert recipe.validation.prompts == 5
    assert recipe_of("schnell-16gb", replace(WISHES, prompts=tmp_path, prompt_count=10**6)).validation.prompts == 32


def test_images_can_be_left_out_and_get_another_vae():
    assert recipe_of("schnell-16gb", WISHES).preview.vae == "ae.safetensors"
    assert [recipe_of("schnell-16gb", replace(WISHES, vae=vae)).preview.vae for vae in ("", "mine.safetensors")] == ["", "mine.safetensors"]


@pytest.mark.parametrize("name", ["", "../up", "a/b", "C:\\x", "mine.safetensors", ".hidden", "a\nb"])
def test_a_name_that_is_not_one_of_a_file_is_refused(name):
    with pytest.raises(ValueError, match="cannot be the name of the encoder: expected"):
        check_name(name)


def test_the_starter_prompts_are_enough_to_train_with():
    assert len(set(starter_prompts().splitlines())) > 100
