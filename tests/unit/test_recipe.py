"""Recipes: written and read back, refused with the key of every problem, found by name; their settings are in test_recipe_settings.py."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from distilled_t5.config.files import SHIPPED, ConfigError, options
from distilled_t5.config.toml import toml_value, write_toml
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.tests.support.recipes import SMOKE, recipe_of, refusal
from distilled_t5.train.recipe import Recipe, load_recipe
from pydantic import ValidationError

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))
TABLES = {key.rpartition(".")[0] for key in options(Recipe)}
OPTIONS = sorted(set(options(Recipe)) - TABLES)
# Keys that a recipe leaves out at their usual value.
LATER = [
    "diffusion_model.family=sd3",
    "optimizer.restart_per_stage=true",
    "teacher.clip_g=clip_g.safetensors",
    "teacher.cache=cache",
    "sampling.cfg=[4.5]",
    "sampling.negatives=0.1",
    "student.trunk=frozen",
    "stage.0.objective=early",
    "stage.0.blocks=2",
    "stage.0.trajectory_steps=1",
]
# Another one, for families without companions.
SHARED = ["diffusion_model.family=chroma", "teacher.clip_l=none", 'output.also_serves=["pixart_sigma"]']
PAPER = (SHIPPED / "flux-dev-paper.toml").read_text(encoding="utf-8")
TWO = (SHIPPED / "smoke-two-students.toml").read_text(encoding="utf-8")
# A recipe with the table of another kind of student.
SMOKE_QWEN3 = (SHIPPED / "smoke-z-image.toml").read_text(encoding="utf-8")


def test_windows_line_endings_are_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(SMOKE.replace("\n", "\r\n").encode())
    assert load_recipe(str(path)) == load_recipe("smoke")


# --- writing ---


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_round_trip_exactly(name, tmp_path):
    recipe = load_recipe(name)
    text = recipe.to_toml()
    again = recipe_of(tmp_path, text)
    assert again == recipe
    assert again.to_toml() == text
    assert again.differences(recipe) == []


def test_hash_is_that_of_the_written_file_and_forgets_comments_and_order(tmp_path):
    recipe = load_recipe("smoke")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8", newline="\n")
    assert hashlib.sha256((tmp_path / "recipe.toml").read_bytes()).hexdigest() == recipe.sha256
    data = tomllib.loads(SMOKE)
    shuffled = write_toml(dict(reversed(data.items())))
    assert recipe_of(tmp_path, shuffled).sha256 == recipe.sha256
    assert load_recipe("smoke", ["seed=1"]).sha256 != recipe.sha256


def test_where_a_run_is_reported_decides_nothing_of_it_and_leaves_its_hash(tmp_path):
    recipe, reported = load_recipe("smoke"), load_recipe("smoke", ["report.wandb=true"])
    assert reported.sha256 == recipe.sha256
    assert recipe.differences(reported) == []
    assert "wandb" not in recipe.to_toml()
    assert recipe_of(tmp_path, reported.to_toml()).report.wandb


def test_prompts_of_any_letters_round_trip_in_a_recipe(tmp_path):
    prompt = 'a sign: "C:\\new" \'\'\' """ # \u00fc \u732b\n\ttwo lines'
    recipe = recipe_of(tmp_path, SMOKE.replace('"a red cube left of a blue ball"', toml_value(prompt)))
    assert recipe.preview.prompts == (prompt,)
    assert recipe_of(tmp_path, recipe.to_toml()) == recipe


# --- refusals ---


@pytest.mark.parametrize("option", OPTIONS)
def test_misspelt_key_is_refused_with_the_nearest_key(option, tmp_path):
    of_qwen3 = "layout" in option and option.rpartition(".")[2] not in SMOKE
    base = SMOKE_QWEN3 if of_qwen3 else TWO if option == "student.name" else SMOKE if "layout" in option else PAPER
    later = [] if of_qwen3 or base == TWO else SHARED if option == "output.also_serves" else LATER
    text = recipe_of(tmp_path, base, *later, "report.wandb=true").to_toml()
    *tables, key = option.split(".")
    misspelt = key[:-1] + "_" + key[-1]
    start = {0: 0, 1: text.find(f"[{tables[0]}]") if tables else 0, 2: text.find("layout =" if "layout" in option else "corpora =")}[
        len(tables)
    ]
    before, after = text[:start], text[start:]
    changed = before + re.sub(rf"\b{key} = ", f"{misspelt} = ", after, count=1)
    (found,) = [detail for detail in refusal(tmp_path, changed) if "is not a key" in detail]
    assert misspelt in found
    assert found.endswith(f"the nearest is {option}")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rate", "optimizer.learning_rate"),
        ("optimiser", "optimizer"),
        ("stages", "stage"),
        ("checkpoint_blocks", "diffusion_model.checkpoint_blocks"),
    ],
)
def test_misplaced_key_is_refused_with_its_right_place(key, nearest, tmp_path):
    (found,) = refusal(tmp_path, f"{key} = 1\n{SMOKE}")
    assert found == f"{key} is not a key of a recipe; the nearest is {nearest}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed = 0", 'seed = "0"', 'seed: expected a valid integer, got "0"'),
        ("seed = 0", "seed = 0.0", "seed: expected a valid integer, got 0.0"),
        ("seed = 0", "seed = true", "seed: expected a valid integer, got true"),
        ("seed = 0", "seed = -1", "seed: expected greater than or equal to 0, got -1"),
        ("seed = 0", "seed = 2147483648", "seed: expected less than 2147483648"),
        ("chunk_prompts = 32", "chunk_prompts = 0", "teacher.chunk_prompts: expected greater than or equal to 1, got 0"),
        ("checkpoint_blocks = true", "checkpoint_blocks = 1", "diffusion_model.checkpoint_blocks: expected a valid boolean, got 1"),
        ('dtype = "fp32"', 'dtype = "fp8"', "dtype: expected 'auto', 'fp32', 'bf16', 'fp16' or 'fp8_e4m3fn', got \"fp8\""),
        ('file = "stand-in"', 'file = ""', 'diffusion_model.file: expected at least 1 character, got ""'),
        ("layout = {", "layout = 5 # {", "student.layout: expected a table, got 5"),
        ("d_model = 64", 'd_model = "64"', 'student.layout.d_model: expected a valid integer, got "64"'),
        ("dropout = 0.0", "dropout = 1.0", "student.dropout: expected less than 1, got 1.0"),
        ("learning_rate = 1e-3", "learning_rate = 0", "optimizer.learning_rate: expected greater than 0, got 0"),
        ("learning_rate = 1e-3", "learning_rate = nan", "optimizer.learning_rate: expected a finite number, got nan"),
        ("learning_rate = 1e-3", 'learning_rate = "1e-3"', 'optimizer.learning_rate: expected a valid number, got "1e-3"'),
        ("guidance = [2.0", 'guidance = ["x"', 'sampling.guidance.0: expected a valid number, got "x"'),
        ("guidance = [2.0, 3.5, 5.0]", "guidance = 3.5", "sampling.guidance: expected a list, got 3.5"),
        ("token_lengths = [16, 32]", "token_lengths = []", "sampling.token_lengths: expected at least one entry, got []"),
        ("token_lengths = [16, 32]", "token_lengths = [16, 5000]", "token_lengths.1: expected less than or equal to 4096, got 5000"),
        ("token_lengths = [16, 32]", "token_lengths = [16, 2024-01-01]", "token_lengths.1: expected a valid integer, got 2024-01-01"),
        ('name = "distilled_t5_smoke"', 'name = "../smoke"', "output.name: expected a file name of letters"),
        ('name = "distilled_t5_smoke"', 'name = "smoke.safetensors"', 'without folder and extension, got "smoke.safetensors"'),
        ("resolution_px = 64", "resolution_px = 100", "stage.0.resolution_px: expected a multiple of 16, got 100"),
        ('objective = "embedding"', 'objective = "velocty"', "stage.0.objective: expected one of velocity, early, text_stream,"),
        (', path = "prompts/words/sentences.txt"', "", "stage.0.corpora.0: a corpus of kind lines needs a path"),
        ('kind = "lines"', 'kind = "csv"', "a corpus of kind csv needs the column that holds the prompt"),
        ('kind = "lines"', 'kind = "common_text"', "stage.0.corpora.0: common_text is generated: expected no path"),
        ('kind = "lines"', 'kind = "lines", column = "y"', "stage.0.corpora.0: a corpus of kind lines has no columns"),
        ("start = ", 'size = "base"\nstart = ', "student: expected either size or layout, got both"),
        ("layout = {", "# {", "student: expected either size or layout, got neither"),
        ('name = "follow-the-steps"', 'name = "embedding-first"', "expected a different name for every stage, got"),
    ],
)  # fmt: skip
def test_wrong_value_is_refused_with_what_was_expected_and_found(old, new, expected, tmp_path):
    assert old in SMOKE
    text = SMOKE.replace(old, new, 1)
    (found,) = refusal(tmp_path, text)
    assert expected in found


def test_missing_keys_and_tables_are_named_with_their_meaning(tmp_path):
    text = SMOKE.replace("beta1 = ", "# ").replace("[output]", "# [output]").replace('name = "distilled_t5_smoke"', "# ")
    details = refusal(tmp_path, text)
    assert details == [
        "optimizer.beta1 is missing (decay per step of the running mean of gradients)",
        "output is missing (the trained encoder)",
    ]


def test_all_problems_are_listed_at_once(tmp_path):
    text = SMOKE
    for old, new in [
        ("seed = 0", "sead = 0"),
        ("dropout = 0.0", 'dropout = "x"'),
        ("steps = 40", "steps = 0"),
        ("gated", "gatd"),
        ("beta2", "# "),
    ]:
        text = text.replace(old, new, 1)
    details = refusal(tmp_path, text, "validation.prompts=none", "stage.7.steps=5", "nonsense")
    assert len(details) == 3 + 5 + 2, "a misspelt key is also missing under its right name"
    for part in (
        "sead",
        "student.dropout",
        "stage.1.steps",
        "gatd",
        "beta2",
        "validation.prompts",
        "stage has 2 entries",
        "expected part.key=value",
    ):
        assert any(part in detail for detail in details), part


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'name = "x"\nseed = = 1\n', "line 2"),
        (b'name = "x"\nname = "y"\n', "line 2"),
        (b"name = smoke\n", "line 1"),
        (b"seed = 1\n\xff\xfe\n", "is not UTF-8 text"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "is not valid TOML: arrays or tables are nested too deeply"),
        (b"", "name is missing"),
        (b"\x00\x01", "is not valid TOML"),
    ],
)
def test_file_that_is_not_a_recipe_is_refused(content, expected, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert str(caught.value).splitlines()[-1].startswith("What to do: ")


def test_file_of_a_windows_editor_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMOKE.encode())
    assert load_recipe(str(path)) == load_recipe("smoke")


# --- finding a recipe ---


@pytest.mark.parametrize("name", ["smoke", "smoke.toml", "recipes/smoke.toml", "recipes/smoke"])
def test_shipped_recipe_is_found_by_name_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    assert load_recipe(name).name == "smoke"


def test_file_in_the_folder_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke.toml").write_text(SMOKE.replace("seed = 0", "seed = 7"), encoding="utf-8")
    assert load_recipe("smoke.toml").seed == 7
    assert load_recipe("smoke").seed == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smok", "did you mean smoke?"),
        ("schnell-24", "did you mean schnell-24gb?"),
        ("no/such/file.toml", "it does not exist"),
        ("elsewhere/smoke.toml", "it does not exist"),
        (".", "it is a folder"),
        ("", "it is a folder"),
    ],
)
def test_unknown_recipe_is_refused_with_the_shipped_names(name, expected):
    with pytest.raises(ConfigError) as caught:
        load_recipe(name)
    assert expected in str(caught.value)
    assert all(shipped in str(caught.value) for shipped in NAMES)


# --- what a recipe does ---


def test_differences_name_key_old_and_new():
    recipe = load_recipe("smoke")
    changed = load_recipe(
        "smoke",
        [
            "optimizer.learning_rate=0.002",
            "sampling.guidance=[1]",
            "stage.1.steps=4",
            'student={ size = "base", start = "flan-t5-base", projection_width = 128, dropout = 0.0 }',
        ],
    )
    assert set(recipe.differences(changed)) == {
        "optimizer.learning_rate: 0.001 -> 0.002",
        "sampling.guidance: [2.0, 3.5, 5.0] -> [1.0]",
        "stage.1.steps: 40 -> 4",
        'student.size: not set -> "base"',
        'student.start: "random" -> "flan-t5-base"',
        "student.layout.d_model: 64 -> not set",
        "student.layout.d_ff: 128 -> not set",
        "student.layout.num_layers: 2 -> not set",
        "student.layout.num_heads: 2 -> not set",
        "student.layout.d_kv: 32 -> not set",
        "student.layout.gated: true -> not set",
    }


def test_dropped_stage_is_a_difference(tmp_path):
    shorter = recipe_of(tmp_path, SMOKE[: SMOKE.rindex("# The method itself")])
    lines = load_recipe("smoke").differences(shorter)
    assert 'stage.1.name: "follow-the-steps" -> not set' in lines
    assert all(line.startswith("stage.1.") for line in lines)


def test_recipe_cannot_be_changed():
    recipe = load_recipe("smoke")
    with pytest.raises(ValidationError):
        recipe.seed = 1
    with pytest.raises(ValidationError):
        recipe.stages[0].steps = 1
    assert hash(recipe) == hash(load_recipe("smoke"))


def test_layout_of_named_and_free_sizes():
    assert load_recipe("flux-dev-xl").student_layout(4096) == StudentLayout.named("xl")
    layout = load_recipe("smoke").student_layout(256)
    assert layout == StudentLayout(64, 128, 2, 2, 32, True, hidden_width=128, projected_width=256)


def test_batches_of_a_step_are_shared_out_among_gpus():
    stage = load_recipe("flux-dev-paper").stages[0]
    assert [stage.batches_per_rank(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match=r"8 batches .* among 3 GPUs\.\nWhat to do: set accumulate to a multiple of 3"):
        stage.batches_per_rank(3)


def test_importing_a_recipe_brings_no_torch_and_no_comfyui():
    root = Path(__file__).resolve().parent.parent
    code = (
        "import sys, conftest; import distilled_t5.train.recipe; print([m for m in ('torch', 'comfy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- objectives ---


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["stage.0.objective=early"], "expected 1 or more for the objective early, got 0"),
        (["stage.0.objective=early", "stage.0.blocks=0"], "expected 1 or more for the objective early, got 0"),
        (["stage.0.objective=text_stream", "stage.0.blocks=-1"], "stage.0.blocks: expected greater than or equal to 0, got -1"),
        (["stage.1.blocks=2"], "expected none for the objective velocity, got 2; early and text_stream take it"),
        (["stage.0.objective=projected", "stage.0.blocks=1"], "expected none for the objective projected, got 1"),
        (
            ["diffusion_model.family=pixart_alpha", "stage.0.objective=text_stream", "stage.0.blocks=1"],
            "expected an objective that PixArt-alpha has, got text_stream; early and velocity fit every family",
        ),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(settings, expected):
    more = [f"stage.{stage}.resolution_px=512" for stage in (0, 1)]
    with pytest.raises(ConfigError) as refused:
        load_recipe("smoke", [*more, *settings])
    assert expected in str(refused.value)


def test_blocks_enter_the_hash_where_they_are_given_and_are_kept(tmp_path):
    plain, early = load_recipe("smoke"), load_recipe("smoke", ["stage.1.objective=early", "stage.1.blocks=2"])
    assert "blocks = " not in plain.to_toml().replace("checkpoint_blocks = ", "")
    assert recipe_of(tmp_path, early.to_toml()) == early and early.stages[1].blocks == 2
    assert early.differences(load_recipe("smoke", ["stage.1.objective=early", "stage.1.blocks=1"])) == ["stage.1.blocks: 2 -> 1"]


def test_a_run_needs_the_diffusion_model_for_stages_in_its_blocks_and_for_previews():
    imitates = ["stage.0.objective=projected", "stage.1.objective=whitened"]
    assert not load_recipe("smoke", imitates).needs_diffusion_model
    assert load_recipe("smoke", [*imitates, "preview.vae=ae.safetensors"]).needs_diffusion_model
    assert load_recipe("smoke", ["stage.0.objective=keys_values", "stage.1.objective=whitened"]).needs_diffusion_model
