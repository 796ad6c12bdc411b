"""A rehearsal on fake tensors: what it counts of full-size models, its report, and a run without it.

`practice_rehearsal.py` compares it with the real step on an accelerator.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from distilled_t5.config.files import SHIPPED, shipped_names
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.flops import flop_counter
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.trainer import PACK, command, finish
from distilled_t5.train import commands, rehearsal
from distilled_t5.train.distill import train_step
from distilled_t5.train.gpus import SHOWN_BYTES_PER_GB
from distilled_t5.train.memory import Rehearsal, usable_of
from distilled_t5.train.models import less_memory, less_memory_for_texts, what_fits
from distilled_t5.train.objectives import OBJECTIVES
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.rehearsal import Target
from distilled_t5.train.rehearsal_report import Question, hours, recipe_row, report, verdict
from distilled_t5.train.remedies import smaller
from distilled_t5.train.workshop import open_workshop

TABLE_S = 1800
GPU = Target(torch.device("cpu"), as_gpu=True)
# Here every rehearsal is computed, whatever `computed_once` of conftest.py keeps.
rehearse = inspect.unwrap(rehearsal.rehearse)


@pytest.fixture(scope="module", autouse=True)
def rehearsed_each_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "rehearse", rehearse)
        yield


def one_stage(name: str, *settings: str) -> Recipe:
    recipe = load_recipe(name, settings)
    return recipe.model_copy(update={"stages": recipe.stages[:1]})


@pytest.fixture(scope="module")
def schnell() -> Rehearsal:
    """Flux schnell of full size in fp8, T5-XXL and T5-Base, without any file."""
    return rehearse(one_stage("schnell-24gb"), GPU)


def test_a_full_size_run_has_the_weights_that_are_published(schnell):
    # Flux schnell has 11,891,178,560 weights, T5-Base with its projection 129,551,488, T5-XXL 4,762,310,656.
    assert schnell.model == pytest.approx(11_891_178_560, rel=1e-4)
    assert (schnell.student, schnell.parameters) == (4 * 129_551_488, 129_551_488)
    assert schnell.moments == pytest.approx(8 * 129_551_488, rel=1e-3)
    assert schnell.teacher == pytest.approx(2 * 4_762_310_656, rel=0.03), "and CLIP-L"


def test_the_parts_of_the_peak_are_those_of_a_step_with_checkpointed_blocks(schnell):
    need = schnell.stages[0].need
    tokens, width = 4 * (1024 + 256), 3072
    inputs = 57 * tokens * width * 2
    assert need.during == "diffusion model's backward pass"
    assert inputs <= need.all_here["diffusion model's activations"] <= 1.1 * inputs
    assert need.all_here["student's gradients"] == schnell.student
    assert need.least == pytest.approx(need.total - schnell.model, rel=0.03)
    # By hand: each token meets 12 x width^2 weights in a block, in 3.6 passes; attention has 5.5 passes. Eight batches make a step.
    products = 3.6 * 57 * 2 * 12 * width**2 * tokens
    attention = 5.5 * 57 * 4 * width * 4 * (1024 + 256) ** 2
    assert sum(schnell.stages[0].flops.values()) == pytest.approx(8 * (products + attention), rel=0.03)


def test_whether_a_run_fits_is_said_with_and_without_offloading(schnell):
    assert verdict(schnell, 24 * 10**9) == "fits"
    assert re.fullmatch(r"fits with offloading: at least \d+\.\d GB of the diffusion model stay in RAM", verdict(schnell, 12 * 10**9))
    assert re.fullmatch(r"does not fit: \d+\.\d GB are needed with everything offloaded", verdict(schnell, 4 * 10**9))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_familys_published_model_is_known_without_its_file(family):
    assert set(family.published) <= set(family.sources), "a file that users can download"
    assert family.published


def test_operations_equal_those_of_the_real_step_on_a_cpu():
    recipe = one_stage("smoke", "stage.0.objective=velocity", "sampling.token_lengths=[16]", "optimizer.muon_learning_rate=0.01")
    workshop = open_workshop(recipe, Ranks())
    positions = workshop.starts_at(workshop.schedule.place(0))
    with (
        workshop.model.differentiable(recipe.diffusion_model.checkpoint_blocks),
        flop_counter() as real,
    ):
        train_step(positions, workshop.model, workshop.learners, OBJECTIVES["velocity"])
    assert workshop.rehearsal is not None
    assert sum(workshop.rehearsal.stages[0].flops.values()) == real.get_total_flops()


def test_a_rehearsal_in_comfyuis_server_is_that_of_the_command(monkeypatch):
    usual = rehearse(load_recipe("smoke"), Target(torch.device("cpu")))
    # As its main.py sets them on NVIDIA GPUs.
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    assert rehearse(load_recipe("smoke"), Target(torch.device("cpu"))) == usual


def test_where_a_rehearsal_is_not_possible_the_run_says_so_and_goes_on(monkeypatch, caplog):
    def old(*_arguments, **_named):
        raise NotImplementedError("aten::new_operator\nmore")

    monkeypatch.setattr(rehearsal, "rehearse", old)
    workshop = open_workshop(load_recipe("smoke"), Ranks())
    assert workshop.rehearsal is None
    assert "The run is not rehearsed, so its memory is not known before it starts; it goes on." in caplog.text
    assert (
        "smoke cannot be rehearsed with torch" in caplog.text and "(NotImplementedError: aten::new_operator).\nWhat to do: " in caplog.text
    )
    workshop.load_model()


SQUEEZED = load_recipe("smoke", ["diffusion_model.checkpoint_blocks=false", "stage.1.resolution_px=256", "stage.1.batch=8"])


def rehearsed_on_gpu(recipe: Recipe) -> Rehearsal:
    return rehearse(recipe, GPU)


@pytest.mark.parametrize("share", [pytest.param(0.95, marks=pytest.mark.full), 0.6, pytest.param(0.1, marks=pytest.mark.full)])
def test_the_first_changes_with_which_a_run_fits_are_named(share, caplog):
    found = rehearsed_on_gpu(SQUEEZED)
    usable = int(share * found.least)
    total = next(size for size in range(usable, 2 * usable) if usable_of(size, True) == usable)
    said = what_fits(SQUEEZED, found, total, rehearsed_on_gpu).splitlines()
    assert "Rehearsing changes of the recipe that take less memory, " in caplog.text
    candidates = [*smaller(SQUEEZED)]
    if share == 0.1:
        assert said[0] == "use a machine with more memory; no change of the recipe is enough, as rehearsed:"
        assert rehearsed_on_gpu(candidates[-1]).least > usable
        return
    assert said[0] == "make these changes (--set KEY=VALUE), as rehearsed:"
    changes = said[-2].partition(" GB, fits: ")[2]
    place = next(place for place, one in enumerate(candidates) if "; ".join(SQUEEZED.differences(one)) == changes)
    before = found if place == 0 else rehearsed_on_gpu(candidates[place - 1])
    assert rehearsed_on_gpu(candidates[place]).least <= usable < before.least
    assert said[-1].startswith("No shipped recipe is made for so little memory.")


def test_changes_for_an_offloaded_run_that_ran_out_of_memory_leave_the_model_in_ram_too():
    found = rehearsed_on_gpu(SQUEEZED)
    # Everything of the first candidates that are smaller fits at once.
    said = what_fits(SQUEEZED, found, int((found.total - 1) / 0.95), rehearsed_on_gpu).splitlines()
    assert said[0] == "make these changes (--set KEY=VALUE), as rehearsed:"
    advised = float(said[-2].split()[0])
    assert 0 < advised <= 0.9 * found.least / 1e9 + 0.05


def test_the_report_of_a_run_that_does_not_fit_ends_its_verdict_with_what_to_do():
    said = report(SQUEEZED, Question.of("0.05gb", None, 0.4, None))
    assert re.search(r"does not fit: 0\.\d GB are needed with everything offloaded\.\nWhat to do: .*, as rehearsed:\n  0\.\d GB, ", said)


def test_a_run_that_ran_out_of_memory_and_cannot_be_rehearsed_gets_general_advice(monkeypatch):
    def old(*_arguments, **_named):
        raise NotImplementedError("aten::new_operator")

    monkeypatch.setattr(rehearsal, "rehearse", old)
    assert less_memory(SQUEEZED, 1).startswith(
        "lower batch and raise accumulate by the same factor, or lower resolution_px or the longest of"
    )


def test_advice_for_a_cache_that_ran_out_of_memory_says_what_the_teacher_takes_and_what_takes_less():
    one = load_recipe("smoke", ["teacher.cache=cache"])
    need = rehearse(one, Target(torch.device("cpu"))).encoding
    said = less_memory_for_texts(one)
    assert "run the same command again: it goes on" in said
    assert f"The teacher takes {need.total / 1e9:.1f} GB while it encodes, as rehearsed; cpu has " in said
    assert "a smaller file of the teacher in teacher.t5, such as one in fp8" in said
    given = commands.command_line().parse_args(["cache", "smoke", "--set", "teacher.cache=cache"])
    assert commands.memory_advice(given) == said
    # Each text is encoded alone.
    assert need.total < rehearse(load_recipe("smoke"), Target(torch.device("cpu"))).encoding.total


def test_on_a_cpu_a_cache_is_advised_where_the_teacher_is_what_does_not_fit():
    recipe = load_recipe("smoke")
    device = Target(torch.device("cpu"))
    found, cached = rehearse(recipe, device), rehearse(recipe.with_cache("teacher-cache"), device)
    assert cached.total < found.total
    said = what_fits(recipe, found, cached.total, lambda changed: rehearse(changed, device)).splitlines()
    assert said[1].endswith('fits: teacher.cache: not set -> "teacher-cache"; teacher.cache_format: not set -> "bf16"')


def test_without_a_recipe_the_estimate_is_that_of_the_overnight_recipe_for_this_gpu(comfyui_path, tmp_path):
    arguments = [str(PACK / "train"), "--estimate", "--comfyui", str(comfyui_path), "--", "--base-directory", str(tmp_path), "--cpu"]
    said = finish(arguments, tmp_path, code=1)
    assert (
        "No GPU was found: --estimate without RECIPE measures the overnight recipe for this machine's GPU.\nWhat to do: name a recipe"
        in said
    )


def test_the_command_reports_memory_time_and_cost_without_loading_anything(comfyui_path, tmp_path):
    said = finish(command(comfyui_path, tmp_path, tmp_path / "run", "--rehearse", "--gpu", "rtx 4090", "--price", "0.5"), tmp_path)
    assert not (tmp_path / "run").exists()
    assert "Rehearsal of smoke on fake tensors" in said
    for part in ("embedding-first", "follow-the-steps", "student's gradients", "RTX 4090", "TFLOP/s", "per hour", "RAM by part", "Disk:"):
        assert part in said, part
    assert re.search(r"RTX 4090, 25\.0 GB, of which 25\.0 GB can be used: fits\.", said)


def test_hours_are_those_of_the_operations_at_the_share_of_the_peak(schnell):
    question = Question.of(None, "RTX 4090", 0.5, None)
    assert question.gpu is not None and question.memory_bytes == question.gpu.memory_bytes
    flops = sum(schnell.stages[0].flops.values()) * schnell.stages[0].steps
    assert hours(schnell, question.gpu, 0.5) == pytest.approx(flops / (0.5 * 165.2e12) / 3600)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("12 potatoes", None, 0.4, None), r"--memory: expected a size such as 12gb, got 12 potatoes"),
        (("0gb", None, 0.4, None), r"--memory: expected a size"),
        ((None, "RTX 9999", 0.4, None), r"--gpu: RTX 9999 is not in the table of GPUs"),
        ((None, None, 1.5, None), r"--share: expected more than 0 and at most 1, got 1\.5"),
        ((None, None, 0.4, -1.0), r"--price: expected 0 or more, got -1"),
    ],
)
def test_wrong_options_are_refused_with_what_is_expected(options, message):
    with pytest.raises(UserError, match=message):
        Question.of(*options)


def test_a_size_in_gb_is_that_of_a_card_as_it_is_sold():
    assert Question.of("12gb", None, 0.4, None).memory_bytes == Question.of("12", None, 0.4, None).memory_bytes == int(12 * 0.97 * 2**30)


def test_a_model_of_unknown_sizes_is_named(monkeypatch):
    monkeypatch.setitem(vars(FAMILIES["flux"]), "published", {})
    with pytest.raises(ValueError, match=r"my_flux\.safetensors was not found, and the sizes of a published Flux\.1 are not known here"):
        rehearse(load_recipe("smoke", ["diffusion_model.file=my_flux.safetensors"]), GPU)


def numbers(row: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r" (?:under )?([\d.,]+)", row)]


def shipped_row(name: str) -> str:
    """The row of a recipe in docs/recipes.md."""
    rows = (SHIPPED.parent / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines()
    return next(row for row in rows if re.match(rf"\| `{name}` \| \d", row))


def test_the_row_of_smoke_is_that_of_its_rehearsal():
    assert numbers(recipe_row("smoke")) == pytest.approx(numbers(shipped_row("smoke")), abs=0.11)


@pytest.mark.full
def test_the_table_of_recipes_is_what_the_command_prints(comfyui_path, tmp_path):
    arguments = [str(PACK / "train"), "--rehearse", "--comfyui", str(comfyui_path), "--", "--base-directory", str(tmp_path)]
    status, said = run_prepared(arguments, tmp_path, TABLE_S)
    rows = [line for line in said.splitlines() if line.startswith("| `")]
    assert status == 0, said
    assert [row.split("`")[1] for row in rows] == shipped_names()
    for row in rows:
        name = row.split("`")[1]
        assert numbers(row) == pytest.approx(numbers(shipped_row(name)), rel=0.02, abs=0.11), name


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*-*gb.toml")))
def test_recipes_fit_the_memory_in_their_names(name):
    size_gb = int(re.findall(r"-(\d+)gb$", name)[0])
    peak_gb, offloaded_gb = numbers(shipped_row(name))[:2]
    assert offloaded_gb * 1e9 <= usable_of(int(size_gb * SHOWN_BYTES_PER_GB), True)
    assert (peak_gb * 1e9 <= usable_of(int(size_gb * SHOWN_BYTES_PER_GB), True)) == (size_gb == 24)
