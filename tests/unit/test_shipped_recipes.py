"""The shipped recipes: what they promise, and that no option is without one."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from typing import Any

import pytest
from distilled_t5.config.files import SHIPPED, options, shipped_names
from distilled_t5.devtools.docs import recipe_tables
from distilled_t5.miniature.files import FLUX_FILE, SD3_FILE, TEACHER_FILE, VAE_FILE
from distilled_t5.miniature.teacher import LAYOUT
from distilled_t5.train.cache_plan import expected
from distilled_t5.train.distill import linear_schedule
from distilled_t5.train.objectives import OBJECTIVES
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.world.captions import TOKEN_LENGTH
from distilled_t5.world.pictures import CELL_PX, SIDE

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))
SCHNELL = [name for name in NAMES if name.startswith("schnell")]
MINIATURE = ["half", "quarter", "tenth", "fortieth"]
OVERNIGHT = [name for name in NAMES if "-overnight-" in name]
DEV = [name for name in NAMES if name.startswith("flux-dev") and name not in OVERNIGHT]
KEYS = {
    "": ["name", "seed"],
    "teacher.": ["t5", "clip_l", "clip_g", "chunk_prompts", "cache", "cache_format"],
    "diffusion_model.": ["file", "dtype", "checkpoint_blocks", "family"],
    "student.": ["name", "size", "start", "trunk", "projection_width", "dropout"],
    "student.layout.": [
        *("d_model", "d_ff", "num_layers", "num_heads", "d_kv", "gated"),
        *("hidden_size", "intermediate_size", "num_kv_heads"),
    ],
    "optimizer.": [
        "learning_rate",
        "muon_learning_rate",
        "restart_per_stage",
        "weight_decay",
        "beta1",
        "beta2",
        "warmup_steps",
        "max_gradient_norm",
        "autocast",
    ],
    "sampling.": ["steps", "guidance", "token_lengths", "cfg", "negatives"],
    "validation.": ["prompts", "every_steps", "sigma_bands"],
    "checkpoints.": ["every_steps", "keep_last"],
    "preview.": ["every_steps", "prompts", "vae"],
    "report.": ["wandb"],
    "output.": ["name", "also_serves"],
    "stage.": ["name", "resolution_px", "steps", "batch", "accumulate", "objective", "blocks", "trajectory_steps"],
    "stage.corpora.": ["kind", "path", "column", "repeat", "limit", "mix"],
}
OPTIONS = [part + key for part, keys in KEYS.items() for key in keys]


def keys_used(value: Any, prefix: str = "") -> set[str]:
    """Dotted names, without positions, of all that parsed TOML sets, tables included."""
    if isinstance(value, list):
        return set().union(*(keys_used(item, prefix) for item in value))
    if not isinstance(value, dict):
        return set()
    return {prefix + key for key in value}.union(*(keys_used(item, f"{prefix}{key}.") for key, item in value.items()))


def test_list_of_options_is_frozen():
    found = options(Recipe)
    tables = {key.rpartition(".")[0] for key in found}
    assert sorted(set(found) - tables) == sorted(OPTIONS)
    assert all(field.description for field in found.values())


def test_every_option_is_used_by_a_shipped_recipe():
    used = set().union(*(keys_used(tomllib.loads(path.read_text(encoding="utf-8"))) for path in SHIPPED.glob("*.toml")))
    # Which other families a student serves has to be measured first.
    assert used == set(options(Recipe)) - {"output.also_serves"}


def test_shipped_recipes_are_those_promised():
    promised = [
        "flux-overnight-24gb",
        "flux-overnight-16gb",
        "flux-overnight-12gb",
        "flux-dev-overnight-24gb",
        "flux-dev-paper",
        "flux-dev-small",
        "flux-dev-large",
        "flux-dev-xl",
        "schnell-24gb",
        "schnell-16gb",
        "schnell-12gb",
        "sd35-medium-24gb",
        "pixart-alpha-paper",
        "pixart-sigma-24gb",
        "chroma-24gb",
        "z-image-overnight-24gb",
        "klein-4b-overnight-24gb",
        "smoke",
        "smoke-two-students",
        "smoke-z-image",
        "miniature-quick",
        *(f"miniature-{size}" for size in MINIATURE),
        "miniature-sd3-quarter",
    ]
    assert sorted(promised) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_says_its_own_name_and_explains_every_key(name):
    text = (SHIPPED / f"{name}.toml").read_text(encoding="ascii")
    recipe = load_recipe(name)
    assert recipe.name == name
    for number, line in enumerate(text.splitlines(), start=1):
        assert len(line) <= 140, f"line {number}"
    first_stage = text.split("[[stage]]")[1].partition("\n\n")[0]
    for part in (text.split("[[stage]]")[0].partition("[teacher]")[2], first_stage):
        for line in part.splitlines():
            if re.match(r"[a-z]\w* = ", line):
                assert "  # " in line, line


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_says_of_its_rehearsal_is_its_row_of_the_table(name):
    row = recipe_tables.rows_of(recipe_tables.PAGE.read_text(encoding="utf-8"))[name]
    said = recipe_tables.COMMENT.findall((SHIPPED / f"{name}.toml").read_text(encoding="ascii"))
    if name.startswith(("smoke", "miniature")):
        assert not said and float(row.split()[0]) < 1
    else:
        assert said == [recipe_tables.comment(row)]


def test_the_table_of_the_readme_is_made_of_the_rows_of_the_page():
    page, readme = (path.read_text(encoding="utf-8") for path in (recipe_tables.PAGE, recipe_tables.README))
    rows = recipe_tables.rows_of(page)
    assert sorted(rows) == NAMES and list(rows) == shipped_names()
    assert recipe_tables.with_rows(page, rows) == page
    assert recipe_tables.compact(rows) in readme
    assert recipe_tables.with_table(readme, rows) == readme


def test_the_readme_shows_every_recipe_of_full_size_once_and_those_for_one_night_first():
    rows = recipe_tables.rows_of(recipe_tables.PAGE.read_text(encoding="utf-8"))
    rows |= {"schnell-12gb": rows["schnell-12gb"].replace("| 6 |", "| under 1 |")}
    shown = re.findall(r"`([\w-]+)`", recipe_tables.compact(rows))
    assert {*shown[: len(OVERNIGHT)]} == {*OVERNIGHT} and shown[len(OVERNIGHT)] == "schnell-12gb"
    assert shipped_names()[: len(OVERNIGHT)] == OVERNIGHT
    small = {name for name in NAMES if name.startswith(("smoke", "miniature-"))}
    assert {*shown} == {*rows} - small - {"flux-dev-small", "flux-dev-large", "flux-dev-xl"}
    assert len({*shown}) == len(shown)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_trains_whole_trajectories_with_known_objectives(name):
    recipe = load_recipe(name)
    for stage in recipe.stages:
        assert stage.steps % recipe.trajectory_steps(stage) == 0
        assert stage.objective in OBJECTIVES
        assert recipe.teacher.chunk_prompts >= stage.batch * stage.accumulate
    assert recipe.optimizer.warmup_steps < sum(stage.steps for stage in recipe.stages)


@pytest.mark.parametrize("name", DEV)
def test_flux_dev_recipes_are_the_papers_three_stages(name):
    recipe = load_recipe(name)
    assert recipe.sampling.steps == 20
    assert recipe.sampling.guidance == (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    assert recipe.optimizer.learning_rate == 1e-4
    assert [(stage.steps, stage.resolution_px) for stage in recipe.stages] == [(50_000, 512), (70_000, 1024), (200_000, 512)]
    assert {stage.batch * stage.accumulate for stage in recipe.stages} == {32}
    assert {stage.objective for stage in recipe.stages} == {"velocity"}
    assert {corpus.mix for stage in recipe.stages for corpus in stage.corpora if corpus.kind == "common_text"} == {"paper"}
    mixes = [[(corpus.kind, corpus.repeat, corpus.limit) for corpus in stage.corpora] for stage in recipe.stages]
    assert mixes == [
        [("compbench", 1, 0)],
        [("common_text", 1, 50_000)],
        [("parquet", 1, 100_000), ("compbench", 10, 0), ("common_text", 1, 50_000)],
    ]
    others = {line.split(":")[0] for line in load_recipe("flux-dev-paper").differences(recipe)}
    assert others <= {"name", "student.size", "student.start", "output.name"}
    assert "non-commercial" in (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")


def test_the_papers_recipe_says_where_it_differs_from_the_paper_and_the_authors_script():
    comments = (SHIPPED / "flux-dev-paper.toml").read_text(encoding="ascii").partition("name = ")[0]
    for difference in ("Learning rate", "Weight decay", "Guidance", "Noise levels", "Start", "Precision", "Token length", "CommonText"):
        assert f"#   {difference}: " in comments
    recipe = load_recipe("flux-dev-paper")
    learning_rate = linear_schedule(recipe.optimizer.learning_rate, recipe.optimizer.warmup_steps, *recipe.periods)
    assert f"stage 3 starts at {learning_rate(120_000):.1e}".replace("e-0", "e-") in comments
    assert not recipe.optimizer.restart_per_stage


def test_the_recipe_of_pixart_alpha_is_that_of_appendix_b():
    recipe, comments = load_recipe("pixart-alpha-paper"), (SHIPPED / "pixart-alpha-paper.toml").read_text(encoding="ascii")
    assert recipe.family.name == "pixart_alpha"
    assert recipe.sampling.cfg == tuple(half / 2 for half in range(10, 21))
    assert (recipe.sampling.steps, recipe.sampling.guidance) == (20, ())
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (1e-4, 0.9, 0.999, 0.01)
    assert {stage.resolution_px for stage in recipe.stages} == {512}
    assert {stage.batch * stage.accumulate for stage in recipe.stages} == {32}
    assert {corpus.kind for stage in recipe.stages for corpus in stage.corpora} == {"parquet", "compbench"}
    for difference in ("Stages and steps", "Learning rate", "Guidance", "Negatives", "Checkpoint", "Prompts"):
        assert f"#   {difference}: " in comments


@pytest.mark.parametrize("name", [name for name in NAMES if load_recipe(name).sampling.cfg])
def test_guided_recipes_train_on_negatives_and_say_that_they_were_not_tried_with_the_real_weights(name):
    recipe = load_recipe(name)
    assert recipe.sampling.negatives == 0.1
    assert set(recipe.teacher.companions) <= set(recipe.family.companions)
    assert "not tried with the real weights" in (SHIPPED / f"{name}.toml").read_text(encoding="ascii")


@pytest.mark.parametrize("name", SCHNELL)
def test_schnell_recipes_take_four_steps_without_guidance_and_hold_the_model_in_fp8(name):
    recipe = load_recipe(name)
    assert (recipe.sampling.steps, recipe.sampling.guidance) == (4, ())
    assert (recipe.diffusion_model.dtype, recipe.diffusion_model.checkpoint_blocks) == ("fp8_e4m3fn", True)
    assert max(recipe.sampling.token_lengths) <= 256, "FLUX.1-schnell was trained with 256 tokens at most"
    assert 256 in recipe.sampling.token_lengths, "ComfyUI pads to 256"
    text = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
    assert "not measured" in text
    assert ("in RAM what does not fit" in text) == (name != "schnell-24gb")


@pytest.mark.parametrize("start", ["schnell", "flux-overnight"])
def test_less_memory_means_fewer_tokens_at_once(start):
    def most(name: str) -> int:
        return max(stage.batch * (stage.resolution_px // 16) ** 2 for stage in load_recipe(name).stages if stage.objective != "projected")

    assert most(f"{start}-24gb") > most(f"{start}-16gb") > most(f"{start}-12gb")


@pytest.mark.parametrize("name", OVERNIGHT)
def test_overnight_recipes_imitate_new_prompts_at_every_step_and_say_what_their_texts_take(name):
    recipe, text = load_recipe(name), (SHIPPED / f"{name}.toml").read_text(encoding="ascii")
    assert [stage.objective for stage in recipe.stages] == ["projected", "early", "velocity"]
    assert [stage.trajectory_steps for stage in recipe.stages] == [1, 0, 0]
    [(texts, size)] = re.findall(r"(?:at most|about) ([\d,]+) texts, ([\d.]+) GB", text)
    plan = expected(recipe, recipe.family.text_width)
    assert (float(texts.replace(",", "")), float(size)) == pytest.approx((plan.texts, plan.size / 1e9), rel=0.05)


@pytest.mark.parametrize("name", [name for name in OVERNIGHT if name.startswith("flux-")])
def test_overnight_recipes_of_flux_imitate_from_the_cache_then_follow_early_then_the_velocity_within_eight_hours(name):
    recipe, text = load_recipe(name), (SHIPPED / f"{name}.toml").read_text(encoding="ascii")
    assert [(stage.objective, stage.blocks) for stage in recipe.stages] == [("projected", 0), ("early", 2), ("velocity", 0)]
    imitate, early, velocity = (stage.steps for stage in recipe.stages)
    assert imitate > early > velocity and velocity <= 0.03 * (imitate + early + velocity)
    assert float(recipe_tables.rows_of(recipe_tables.PAGE.read_text(encoding="utf-8"))[name].split(" | ")[5]) < 8
    assert len({stage.corpora for stage in recipe.stages}) == 1, "each prompt is encoded once"
    assert {corpus.path for corpus in recipe.stages[0].corpora} >= {"corpora/t2i-compbench", "prompts/long.txt"}
    assert recipe.sampling.negatives > 0 and recipe.sampling.token_lengths == (256,)
    assert recipe.teacher.cache and recipe.student.start == "flan-t5-base"
    assert "Rehearsed and not run" in text and ("Apache-2.0" in text) == ("schnell" in recipe.diffusion_model.file)


def test_smoke_needs_no_file_and_is_small():
    recipe = load_recipe("smoke")
    assert (recipe.teacher.t5, recipe.diffusion_model.file) == ("stand-in", "stand-in")
    assert (recipe.teacher.clip_l, recipe.preview.vae, recipe.student.start) == ("none", "", "random")
    assert {corpus.kind for stage in recipe.stages for corpus in stage.corpora} == {"lines"}
    assert {stage.objective for stage in recipe.stages} == {"embedding", "velocity"}
    assert recipe.student_layout(4096).parameters < 4_000_000
    assert sum(stage.steps for stage in recipe.stages) <= 100


def test_students_of_the_miniature_differ_in_size_alone_and_are_as_large_as_they_say():
    teacher = replace(LAYOUT, vocab_size=0).parameters
    shares = {}
    for size in MINIATURE:
        recipe = load_recipe(f"miniature-{size}")
        others = {line.split(":")[0] for line in load_recipe("miniature-half").differences(recipe)}
        assert others <= {"name", "output.name", "student.projection_width"} | {key for key in others if key.startswith("student.layout.")}
        shares[size] = replace(recipe.student_layout(LAYOUT.d_model), vocab_size=0).parameters / teacher
    assert shares == pytest.approx({"half": 1 / 2, "quarter": 1 / 4, "tenth": 1 / 10, "fortieth": 1 / 40}, rel=0.2)


def test_the_quick_student_of_the_miniature_is_the_quarter_in_a_few_steps_of_the_overnight_sequence():
    quarter, quick = load_recipe("miniature-quarter"), load_recipe("miniature-quick")
    others = {line.split(":")[0] for line in quarter.differences(quick)}
    intervals = {f"{part}.every_steps" for part in ("validation", "checkpoints", "preview")}
    lengths = {"optimizer.warmup_steps", "validation.prompts", *intervals}
    assert {key for key in others if not key.startswith("stage")} == {"name", "output.name", *lengths}
    assert {stage.corpora for stage in quick.stages} == {quarter.stages[0].corpora}
    assert [stage.objective for stage in quick.stages] == ["projected", "early", "velocity"]


def test_the_student_of_the_miniatures_sd3_is_trained_as_that_of_its_flux():
    others = {line.split(":")[0] for line in load_recipe("miniature-quarter").differences(load_recipe("miniature-sd3-quarter"))}
    assert others == {"name", "diffusion_model.file", "diffusion_model.family", "sampling.guidance", "output.name"}


@pytest.mark.parametrize(("name", "model"), [("miniature-quarter", FLUX_FILE), ("miniature-sd3-quarter", SD3_FILE)])
def test_students_of_the_miniature_need_nothing_but_the_pack(name, model):
    recipe = load_recipe(name)
    assert {recipe.teacher.t5, recipe.diffusion_model.file, recipe.preview.vae} == {TEACHER_FILE, model, VAE_FILE}
    assert all((SHIPPED.parent / corpus.path).is_file() for stage in recipe.stages for corpus in stage.corpora)
    assert recipe.stages[0].resolution_px == SIDE * CELL_PX
    assert recipe.sampling.token_lengths == (TOKEN_LENGTH,)
