"""Recipes made of a shipped one and what the graph says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from distilled_t5.config.files import shipped_names
from distilled_t5.train.lengths import differences_besides_lengths
from distilled_t5.train.presets import Wishes, check_name, preset_names, recipe_of, starter_prompts
from distilled_t5.train.recipe import load_recipe

WISHES = Wishes("flux.safetensors", None, "t5.safetensors", {"clip_l": "clip_l.safetensors"}, "mine")


def test_without_wishes_only_models_name_and_seed_differ_from_the_preset():
    for preset in preset_names():
        changed = {line.partition(":")[0] for line in load_recipe(preset).differences(recipe_of(preset, WISHES))}
        assert changed <= {"teacher.t5", "teacher.clip_l", "teacher.clip_g", "diffusion_model.file", "output.name", "seed"}


def test_runs_for_a_first_try_of_the_trainer_are_not_presets():
    assert "smoke-z-image" in shipped_names()
    assert not [name for name in preset_names() if name.startswith("smoke")]


@pytest.mark.parametrize(
    ("companions", "expected"),
    [({}, {}), ({"clip_g": "mine_g.safetensors"}, {"clip_g": "mine_g.safetensors"}), ({"clip_l": "l", "clip_g": "g"},) * 2],
    ids=["none", "one", "both"],
)
def test_the_companions_are_those_of_the_connected_clip_and_never_the_presets(companions, expected):
    preset = "sd35-medium-24gb"
    assert set(load_recipe(preset).teacher.companions) == {"clip_l", "clip_g"}
    assert recipe_of(preset, replace(WISHES, companions=companions)).teacher.companions == expected


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


def test_presets_that_keep_the_teachers_texts_keep_them_in_the_folder_that_is_named_and_others_none(tmp_path):
    wishes = replace(WISHES, cache=tmp_path / "teacher-cache")
    folders = {preset: recipe_of(preset, wishes).teacher.cache for preset in ("flux-overnight-16gb", "schnell-16gb")}
    assert folders == {"flux-overnight-16gb": str(tmp_path / "teacher-cache"), "schnell-16gb": ""}


def test_a_number_format_takes_the_place_of_the_presets():
    assert recipe_of("schnell-16gb", replace(WISHES, dtype="bf16")).diffusion_model.dtype == "bf16"


@pytest.mark.parametrize(
    ("before", "taken", "after", "expected"),
    [
        (100, 0, 200, [100, 100]),
        (100, 30, 200, [100, 100]),
        (100, 50, 200, [50, 150]),
        (100, 70, 200, [50, 150]),
        (100, 100, 200, [50, 150]),
        (100, 30, 50, [30, 20]),
        (100, 70, 100, [50, 50]),
        (100, 70, 70, [50, 20]),
    ],
)
def test_a_run_that_continues_keeps_the_stages_that_are_over_and_all_other_numbers(before, taken, after, expected):
    begun = recipe_of("schnell-12gb", replace(WISHES, steps=before))
    asked = recipe_of("schnell-12gb", replace(WISHES, steps=after), begun, taken)
    assert [stage.steps for stage in asked.stages] == expected
    assert differences_besides_lengths(begun, asked) == []
    assert recipe_of("schnell-12gb", replace(WISHES, steps=after), asked, taken) == asked


@pytest.mark.parametrize(("objective", "differs"), [("embedding", True), ("velocity", False)])
def test_previews_change_in_a_run_only_if_they_do_not_decide_whether_the_diffusion_model_is_loaded(objective, differs):
    without, beside = (load_recipe("smoke", [f"stage.1.objective={objective}", f"preview.vae={vae}"]) for vae in ("''", "ae.safetensors"))
    assert bool(differences_besides_lengths(without, beside)) == differs


def test_steps_that_are_too_few_are_refused_with_the_fewest_that_are_possible():
    begun = recipe_of("schnell-12gb", replace(WISHES, steps=100))
    with pytest.raises(ValueError, match=r"60 steps are too few .*, 70 of which are taken\.\nWhat to do: set steps to 70 or more"):
        recipe_of("schnell-12gb", replace(WISHES, steps=60), begun, 70)
    with pytest.raises(ValueError, match=r"1 steps are too few .*\nWhat to do: set steps to 2 or more"):
        recipe_of("schnell-12gb", replace(WISHES, steps=1))


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
