"""--estimate on small stand-ins, for every recipe that is shipped."""

from __future__ import annotations

import re

import pytest
from distilled_t5.config.files import SHIPPED
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.trainer import TWO_PROCESSES, command, finish
from distilled_t5.train.estimate import StageEstimate, estimate, ram_lines
from distilled_t5.train.recipe import Recipe, load_recipe

NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))
# A recipe of each family with each kind of stage: in the default run, the others are more data for the same code.
QUICK = ("smoke", "miniature-quick", "flux-dev-paper", "sd35-medium-24gb", "pixart-alpha-paper", "chroma-24gb")
SMALL_STUDENT = (
    '{layout={d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, gated=true}, start="random", projection_width=16, dropout=0.1}'
)
STAND_INS = [
    "teacher.t5=stand-in",
    "teacher.clip_l=none",
    "teacher.clip_g=none",
    "diffusion_model.file=stand-in",
    f"student={SMALL_STUDENT}",
    "sampling.token_lengths=[16]",
    "validation.prompts=2",
    "preview.vae=''",
]
SMALL_STAGE = ['corpora=[{kind="lines", path="prompts/words/sentences.txt"}]', "batch=1", "accumulate=2"]


def on_stand_ins(name: str) -> Recipe:
    """A shipped recipe with small models and pictures; its stages, steps, dtypes and optimizer are its own."""
    stages = [f"stage.{number}.{setting}" for number in range(len(load_recipe(name).stages)) for setting in SMALL_STAGE]
    shipped = load_recipe(name)
    sides = [f"stage.{number}.resolution_px={max(32, shipped.family.least_side_px)}" for number in range(len(shipped.stages))]
    guidance = f"sampling.guidance={[3.5] if shipped.family.name == 'flux' else []}"
    return load_recipe(name, [*STAND_INS, guidance, *stages, *sides])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in NAMES])
def test_every_shipped_recipe_is_estimated_stage_by_stage(name):
    recipe = on_stand_ins(name)
    assert [(stage.name, stage.steps) for stage in recipe.stages] == [(stage.name, stage.steps) for stage in load_recipe(name).stages]
    said = estimate(recipe, Ranks())
    measured = dict(re.findall(r"^(\S+) +([\d,]+) +(?:\d+\.\d\d)? +\d+\.\d\d   ", said, re.MULTILINE))
    stages = {stage.name: f"{stage.steps:,}" for stage in recipe.stages}
    assert measured == stages | {"all": f"{sum(stage.steps for stage in recipe.stages):,}"}
    # With a cache, the teacher is gone before the training.
    teacher = () if recipe.teacher.cache else ("teacher's encoders",)
    for part in ("diffusion model, frozen", "student's weights", "optimizer's running means", *teacher):
        assert re.search(rf"^  {part} +\d+\.\d+ GB$", said, re.MULTILINE), part
    assert re.search(r"rehearsed for stage \S+:$", said, re.MULTILINE)
    assert re.search(r"[\d.]+ GB in all, [\d.]+ GB available\.$", said, re.MULTILINE)
    assert re.search(r"^Disk: [\d.]+ GB for at most \d+ checkpoints", said, re.MULTILINE)


def test_models_change_places_once_per_chunk_and_the_teacher_encodes_once_per_trajectory():
    stage = StageEstimate(
        "a", steps=3600, optimizer_s=1.0, encode_s=4.0, swap_s=80.0, steps_per_trajectory=4, trajectories_per_chunk=10, memory_mb={}
    )
    assert stage.step_s == 1.0 + 4.0 / 4 + 80.0 / (4 * 10)
    assert stage.hours == 4.0


def test_ram_is_reported_by_part_and_for_all_processes():
    parts = {"teacher's encoders": 9_000_000_000, "nothing": 0, "a checkpoint, while it is saved": 1_500_000_000}
    alone, four = ram_lines(parts, 1), ram_lines(parts, 4)
    assert [line.split() for line in alone[1:3]] == [
        ["teacher's", "encoders", "9.000", "GB"],
        ["a", "checkpoint,", "while", "it", "is", "saved", "1.500", "GB"],
    ]
    assert "10.50 GB in all" in alone[-1] and "processes" not in alone[-1]
    assert "42.00 GB for 4 processes on one machine" in four[-1]


@pytest.mark.full
def test_two_processes_print_one_estimate_that_counts_both(comfyui_path, tmp_path):
    said = finish(command(comfyui_path, tmp_path, tmp_path / "run", "--estimate"), tmp_path, launcher=TWO_PROCESSES)
    assert said.count("s/step") == 1
    [each] = re.findall(r"([\d.]+) GB in all, [\d.]+ GB available", said)
    [both] = re.findall(r"Each of the 2 processes takes this much RAM: ([\d.]+) GB for 2 processes on one machine", said)
    assert float(both) == pytest.approx(2 * float(each), abs=0.02)
