"""Recipes changed by settings of the command line: single values of any type, refusals, paths with backslashes."""

from __future__ import annotations

import pytest
from distilled_t5.config.files import ConfigError
from distilled_t5.tests.support.recipes import SMOKE, recipe_of, refusal
from distilled_t5.train.recipe import load_recipe


def test_settings_change_single_values_of_any_type():
    recipe = load_recipe(
        "smoke",
        [
            "stage.0.steps=5",
            "optimizer.learning_rate = 2e-4",
            "diffusion_model.checkpoint_blocks=false",
            "sampling.guidance=[]",
            "sampling.token_lengths.1=64",
            "teacher.t5=models with spaces/t5=xxl.safetensors",
            "preview.vae=",
            'stage.1.corpora=[{ kind = "lines", path = "my prompts.txt", repeat = 3 }]',
            "student.layout.num_heads=3",
            'output.name="1e5"',
            "seed=1",
            "seed=2",
        ],
    )
    assert (recipe.stages[0].steps, recipe.stages[1].steps) == (5, 40)
    assert recipe.optimizer.learning_rate == 2e-4
    assert recipe.diffusion_model.checkpoint_blocks is False
    assert recipe.sampling.guidance == ()
    assert recipe.sampling.token_lengths == (16, 64)
    assert recipe.teacher.t5 == "models with spaces/t5=xxl.safetensors"
    assert recipe.preview.vae == ""
    assert (recipe.stages[1].corpora[0].path, recipe.stages[1].corpora[0].repeat) == ("my prompts.txt", 3)
    assert recipe.student.layout is not None and recipe.student.layout.num_heads == 3
    assert recipe.output.name == "1e5"
    assert recipe.seed == 2


def test_key_that_the_file_leaves_out_can_be_set():
    assert load_recipe("flux-dev-paper", ["stage.0.corpora.0.limit=10"]).stages[0].corpora[0].limit == 10


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat is not a key of a recipe; the nearest is optimizer.learning_rate"),
        ("optimiser.beta1=0.5", "optimiser is not a key of a recipe; the nearest is optimizer"),
        ("optimizer.beta1=half", 'optimizer.beta1: expected a valid number, got "half"'),
        ("seed=5\nname='x'", "seed: expected a valid integer"),
        ("seed=2024-01-01", "seed: expected a valid integer, got 2024-01-01"),
        ("seed", "expected part.key=value"),
        ("=5", "expected part.key=value"),
        ("stage..steps=5", "expected part.key=value"),
        ("stage.2.steps=5", "stage has 2 entries: expected a number from 0 to 1, got 2"),
        ("stage.steps=5", "stage has 2 entries: expected a number from 0 to 1, got steps"),
        ("seed.x=5", "seed is a value, not a table"),
        ("optimizer.0=5", "optimizer.0 is not a key of a recipe"),
        ("0.name=x", "0 is not a key of a recipe"),
        ("sampling.token_lengths.0=x", 'sampling.token_lengths.0: expected a valid integer, got "x"'),
        ("student.layout={ d_model = 1 }", "student.layout.gated is missing"),
        ("output.name=5", "output.name: expected a valid string, got 5"),
        ('output.also_serves=["chroma"]', "output.also_serves: expected families with the teacher and padding of flux (sd3)"),
        ("output.name=\udce9", "output.name: "),
    ],
)
def test_wrong_setting_is_refused_and_quoted(setting, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        recipe_of(tmp_path, SMOKE, setting)
    shown = setting if setting.isprintable() else repr(setting)[1:-1]
    assert f"mine.toml --set {shown}: " in str(caught.value).splitlines()[0]
    assert any(expected in detail for detail in caught.value.problems)
    assert all(line.isprintable() for line in str(caught.value).splitlines())


@pytest.mark.parametrize("value", ['"C:\\x"', "'open", '"D:\\models\\t5.safetensors"'])
def test_quoted_setting_that_is_not_valid_toml_is_refused(value, tmp_path):
    (found,) = refusal(tmp_path, SMOKE, f"teacher.t5={value}")
    assert "not valid TOML" in found and "single quotes" in found and "forward slashes" in found


@pytest.mark.parametrize("value", ["C:\\x", "'C:\\x'", '"C:\\\\x"'])
def test_windows_path_in_a_setting_keeps_its_backslashes(value):
    assert load_recipe("smoke", [f"teacher.t5={value}"]).teacher.t5 == "C:\\x"


PATHS = ["teacher.t5", "teacher.clip_l", "diffusion_model.file", "student.start", "preview.vae", "stage.0.corpora.0.path"]


@pytest.mark.parametrize("key", PATHS)
def test_path_with_escapes_between_double_quotes_is_refused(key, tmp_path):
    (found,) = refusal(tmp_path, SMOKE, f'{key}="D:\\t5\\new"')
    assert found.startswith(f"{key}: a backslash in double quotes starts an escape: write the path in single quotes")
    assert 'got "D:\\t5\\new"' in found


def test_toml_file_with_an_invalid_escape_is_refused_with_advice_about_quotes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SMOKE.replace('file = "stand-in"', 'file = "D:\\models"'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not valid TOML: .*line \d+.*\nWhat to do: .*single quotes"):
        load_recipe(str(path))


def test_warm_up_longer_than_the_run_is_refused(tmp_path):
    assert load_recipe("smoke", ["stage.0.steps=2", "stage.1.steps=2", "optimizer.warmup_steps=4"]).optimizer.warmup_steps == 4
    assert refusal(tmp_path, SMOKE, "stage.0.steps=2", "stage.1.steps=2", "optimizer.warmup_steps=5") == [
        "the recipe: optimizer.warmup_steps: expected at most the 4 steps of the run, got 5"
    ]


def test_warm_up_longer_than_a_stage_is_refused_where_each_stage_has_one(tmp_path):
    settings = ["stage.0.steps=2", "stage.1.steps=8", "optimizer.warmup_steps=3"]
    assert load_recipe("smoke", settings).periods == (10,)
    assert refusal(tmp_path, SMOKE, *settings, "optimizer.restart_per_stage=true") == [
        "the recipe: optimizer.warmup_steps: expected at most the 2 steps of the shortest stage, got 3"
    ]


def test_keys_that_recipes_lacked_earlier_are_written_only_where_they_are_set():
    plain, restarting = load_recipe("smoke"), load_recipe("smoke", ["optimizer.restart_per_stage=true", "optimizer.warmup_steps=1"])
    assert "restart_per_stage" not in plain.to_toml() and "mix" not in plain.to_toml()
    assert load_recipe("smoke", ["optimizer.restart_per_stage=false"]).sha256 == plain.sha256
    assert "restart_per_stage = true" in restarting.to_toml()
    assert "optimizer.restart_per_stage: not set -> true" in plain.differences(restarting)
    assert restarting.periods == tuple(stage.steps for stage in restarting.stages)
