"""What a run needs of memory: numbers worked out by hand for models of full size, and what is said when a device has less."""

from __future__ import annotations

import dataclasses
import math

import pytest
from distilled_t5.families import FAMILIES
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.runtime.header import Entry
from distilled_t5.students.t5.layout import StudentLayout
from distilled_t5.train.file_sizes import size_in_file, text_width_in
from distilled_t5.train.memory import (
    MemoryNeed,
    ModelSize,
    check_memory,
    check_ram,
    memory_need,
    model_activations,
    ram_parts,
    shipped_for,
    without_gpu,
)
from distilled_t5.train.recipe import Recipe, load_recipe

GIB = 2**30
# H = 3072. A double block: 2 x (18 H^2 + 15 H + 256). 19 of them, 38 single ones of 15 H^2 + 11 H + 256, and the ends.
DOUBLE_BLOCK = 339_831_296
DEV_WEIGHTS = 11_901_408_320
SCHNELL_WEIGHTS = DEV_WEIGHTS - 10_229_760
DEV_BF16 = ModelSize(2 * DEV_WEIGHTS, DEV_WEIGHTS, DOUBLE_BLOCK, blocks=57, width=3072, compute_bytes=2)
SCHNELL_FP8 = ModelSize(SCHNELL_WEIGHTS, SCHNELL_WEIGHTS, DOUBLE_BLOCK, blocks=57, width=3072, compute_bytes=2)
T5_XXL_FP16 = 9_524_621_312


def need_of(recipe: Recipe, flow: ModelSize, on_gpu: bool = True) -> MemoryNeed:
    return memory_need(recipe, recipe.student_layout(4096), flow, T5_XXL_FP16, on_gpu)


def test_the_sizes_that_the_numbers_start_from():
    double, single = 2 * (18 * 3072**2 + 15 * 3072 + 256), 15 * 3072**2 + 11 * 3072 + 256
    assert double == DOUBLE_BLOCK
    assert 19 * double + 38 * single + 64_124_992 == DEV_WEIGHTS
    assert StudentLayout.named("xxl", None).parameters * 2 == T5_XXL_FP16


def test_parts_of_schnell_24gb_by_hand():
    need = need_of(load_recipe("schnell-24gb"), SCHNELL_FP8)
    # 4 prompts of 256 text and 1024 picture tokens; T5-Base with its projection has 129,551,488 weights.
    assert need.parts == {
        "diffusion model, frozen": 11_891_178_560,
        "copies of its weights": 2 * 339_831_296,
        "student, gradients and AdamW": 16 * 129_551_488,
        "student's activations": 13 * (4 * 256 * (30 * 768 + 14 * 768 + 16 * 2048) + 4 * 12 * 12 * 256**2)
        + 4 * 256 * 12 * (4096 + 4096)
        + 2 * 129_551_488,
        "teacher's embeddings of one trajectory": 32 * 256 * 4096 * 4,
        "inputs of 57 blocks": 57 * 5120 * 3072 * 2,
        "activations of the current block": 5120 * 3072 * 28 * 4,
        "GPU driver and fragments": 1_000_000_000,
    }
    assert need.total == sum(need.parts.values())
    assert need.least == need.total - 11_891_178_560


def test_room_excludes_what_is_already_on_the_device():
    recipe, weights = load_recipe("schnell-24gb"), 129_551_488
    need = need_of(recipe, SCHNELL_FP8)
    # The student's float32 weights are there before the first step; gradients and moments come with it, moments stay.
    assert need.room(weights, False, 24 * GIB) == need.total - SCHNELL_WEIGHTS - 4 * weights
    assert need.room(weights, True, 24 * GIB) == need.room(weights, False, 24 * GIB) - 8 * weights


def test_weights_used_without_a_cast_need_room_only_if_some_come_from_ram():
    recipe, weights = load_recipe("flux-dev-paper", ["diffusion_model.checkpoint_blocks=false"]), 129_551_488
    need = need_of(recipe, DEV_BF16)
    # Without checkpoints the graph keeps all weights copied to the GPU.
    here = need.room(weights, False, need.total)
    assert here == need.total - 2 * DEV_WEIGHTS - 4 * weights
    assert need.room(weights, False, need.total - 1) == here + 2 * DEV_WEIGHTS, (
        "without checkpoints the graph keeps all weights copied to the GPU"
    )


def test_the_stage_with_the_largest_images_sets_the_need_of_the_papers_recipe():
    need = need_of(load_recipe("flux-dev-paper"), DEV_BF16)
    assert need.stage == "written-words"
    assert need.parts["inputs of 57 blocks"] == 57 * 4 * (4096 + 512) * 3072 * 2
    # bf16 weights on the GPU are used without a copy; weights in RAM are copied to the GPU while their block is computed.
    assert need.parts["copies of its weights"] == 0
    assert need.least == need.total - 2 * DEV_WEIGHTS + 2 * DOUBLE_BLOCK


def test_without_checkpoints_the_graph_keeps_every_weight_that_was_cast():
    recipe = load_recipe("schnell-24gb", ["diffusion_model.checkpoint_blocks=false"])
    need = need_of(recipe, SCHNELL_FP8)
    assert need.parts["copies of its weights"] == 2 * SCHNELL_WEIGHTS
    assert need.parts["activations of 57 blocks"] == 57 * 5120 * 3072 * 14 * 2
    with pytest.raises(ValueError, match="checkpoint_blocks = true"):
        check_memory(need, recipe, 24 * GIB, "cuda:0")


def test_the_embedding_objective_needs_nothing_of_the_diffusion_models_activations():
    recipe = load_recipe("schnell-24gb", [f"stage.{number}.objective=embedding" for number in range(3)])
    assert not any("block" in name for name in need_of(recipe, SCHNELL_FP8).others)


def test_on_a_cpu_everything_including_the_teacher_is_in_ram():
    need = need_of(
        load_recipe("schnell-24gb"), dataclasses.replace(SCHNELL_FP8, held_bytes=4 * SCHNELL_WEIGHTS, compute_bytes=4), on_gpu=False
    )
    assert need.parts["teacher's encoders"] == T5_XXL_FP16
    assert "GPU driver and fragments" not in need.parts
    assert need.least == need.total > 4 * SCHNELL_WEIGHTS + T5_XXL_FP16


@pytest.mark.parametrize(("name", "size_gb"), [("schnell-24gb", 24), ("schnell-16gb", 16), ("schnell-12gb", 12)])
def test_shipped_recipes_fit_the_memory_in_their_names(name, size_gb):
    recipe = load_recipe(name)
    need = need_of(recipe, SCHNELL_FP8)
    check_memory(need, recipe, round(0.97 * size_gb * GIB), "cuda:0")
    assert (need.total <= 0.97 * size_gb * GIB) == (name == "schnell-24gb"), "the others leave some of the diffusion model in RAM"


@pytest.mark.parametrize(("name", "size_gb"), [("flux-dev-small", 48), ("flux-dev-paper", 48), ("flux-dev-large", 48), ("flux-dev-xl", 80)])
def test_the_recipes_for_flux_dev_fit_the_cards_of_the_readme(name, size_gb):
    recipe = load_recipe(name)
    check_memory(need_of(recipe, DEV_BF16), recipe, size_gb * GIB, "cuda:0")


def test_too_little_memory_is_refused_with_what_is_needed_what_is_there_and_the_recipe_that_fits():
    recipe = load_recipe("flux-dev-xl")
    need = need_of(recipe, DEV_BF16)
    with pytest.raises(ValueError, match="Not enough memory on cuda:0") as refusal:
        check_memory(need, recipe, 16 * GIB, "cuda:0")
    message = str(refusal.value)
    assert f"needs {need.least / 1e9:.1f} GB even with as much left in RAM as ComfyUI can; cuda:0 has 17.2 GB" in message
    assert f"{16 * recipe.student_layout(4096).parameters / 1e9:.3f} GB" in message
    assert message.splitlines()[-1].startswith("What to do: lower batch and raise accumulate")
    assert message.endswith("the shipped recipe schnell-16gb is made for this much memory.")


def test_exactly_enough_memory_is_accepted_and_one_byte_less_is_refused():
    recipe = load_recipe("schnell-12gb")
    need = need_of(recipe, SCHNELL_FP8)
    check_memory(need, recipe, need.least, "cuda:0")
    with pytest.raises(ValueError, match="no shipped recipe is made for so little memory"):
        check_memory(need, recipe, need.least - 1, "cuda:0")


def test_the_largest_recipe_that_a_card_holds_is_named():
    # What cards of 8, 12, 16, 24 and 80 GB show.
    sizes = [8_363_704_320, 12_621_709_312, 16_892_723_200, 25_386_352_640, 85_024_112_640]
    assert [shipped_for(size, FAMILIES["flux"]) for size in sizes] == [None, "schnell-12gb", "schnell-16gb", "schnell-24gb", "schnell-24gb"]
    named = {family: shipped_for(sizes[-1], FAMILIES[family]) for family in ("sd3", "pixart_sigma", "chroma", "pixart_alpha")}
    assert named == {"sd3": "sd35-medium-24gb", "pixart_sigma": "pixart-sigma-24gb", "chroma": "chroma-24gb", "pixart_alpha": None}


def test_recipes_of_two_families_with_the_same_memory_size_do_not_hide_each_other():
    assert [shipped_for(25_386_352_640, FAMILIES[name]) for name in ("flux", "sd3")] == ["schnell-24gb", "sd35-medium-24gb"]


def test_parts_of_ram_beside_a_gpu_by_hand():
    recipe = load_recipe("schnell-24gb", ["teacher.chunk_prompts=64", "validation.prompts=10"])
    assert ram_parts(recipe, recipe.student_layout(4096), SCHNELL_WEIGHTS, T5_XXL_FP16, processes=1) == {
        "teacher's encoders": T5_XXL_FP16,
        "diffusion model, while the teacher works": SCHNELL_WEIGHTS,
        # 32 prompts make a trajectory, two of them a chunk.
        "teacher's embeddings of one chunk": 64 * 256 * 4096 * 4,
        "teacher's embeddings of held-out prompts": 10 * 256 * 4096 * 4,
        "a checkpoint, while it is saved": 12 * 129_551_488,
    }


def test_each_of_several_processes_holds_models_of_its_own_and_its_share_of_the_prompts():
    recipe = load_recipe("schnell-24gb", ["teacher.chunk_prompts=1", "validation.prompts=10"])
    one, four = (ram_parts(recipe, recipe.student_layout(4096), SCHNELL_WEIGHTS, T5_XXL_FP16, processes) for processes in (1, 4))
    assert one["teacher's encoders"] == four["teacher's encoders"]
    assert one["teacher's embeddings of one chunk"] == 4 * four["teacher's embeddings of one chunk"] == 32 * 256 * 4096 * 4
    assert four["teacher's embeddings of held-out prompts"] == 4 * 256 * 4096 * 4, "batches of four are dealt out whole"


def test_a_header_tells_the_sizes_of_a_full_flux_as_computed_by_hand():
    entries = {name: Entry("BF16", shape, 0, 2 * math.prod(shape)) for name, shape in FluxLayout().tensors().items()}
    assert size_in_file(entries, "auto", FAMILIES["flux"]) == DEV_BF16
    in_checkpoint = {f"model.diffusion_model.{name}": entry for name, entry in entries.items()}
    assert size_in_file(in_checkpoint | {"vae.a": Entry("F32", (5,), 0, 20)}, "bf16", FAMILIES["flux"]) == DEV_BF16


def test_training_without_a_gpu_is_said_in_days():
    said = without_gpu(load_recipe("flux-dev-paper"), DEV_WEIGHTS)
    # 32 prompts per step; 1024 image tokens at 512 px, 4096 at 1024 px, and 243.25 text tokens on average; 4 forward passes of 2 operations
    # per weight and token.
    tokens = 32 * (250_000 * (1024 + 243.25) + 70_000 * (4096 + 243.25))
    days = 8 * DEV_WEIGHTS * tokens / 1e12 / 86_400
    assert f"about {days:,.0f} days at an assumed 1 TFLOP/s" in said
    assert said.startswith("No GPU is used") and "not practical" in said
    assert said.endswith("use a GPU; schnell-12gb runs on 12 GB.")
    assert without_gpu(load_recipe("smoke"), 100_000) == ""


def test_the_text_width_of_a_teacher_is_that_of_its_projection_or_else_of_its_token_table():
    table = {"shared.weight": Entry("F32", (32128, 128), 0, 0)}
    assert text_width_in([{}, table], FAMILIES["flux"]) == 128
    assert text_width_in([table | {"final_projection.3.weight": Entry("F32", (4096, 10), 0, 0)}], FAMILIES["flux"]) == 4096


def test_another_family_gets_its_own_formulas_and_none_of_fluxs_recipes():
    other = dataclasses.replace(FAMILIES["flux"], name="other", patch_px=32, kept_numbers=7)
    assert shipped_for(10**12, other) is None
    assert other.image_tokens(512) * 4 == FAMILIES["flux"].image_tokens(512)
    flux, half = (model_activations(family, DEV_BF16, 100, checkpoint_blocks=False) for family in (FAMILIES["flux"], other))
    assert flux["activations of 57 blocks"] == 2 * half["activations of 57 blocks"]


def test_ram_beside_a_gpu_must_hold_both_models_and_then_one_with_the_embeddings():
    parts = {
        "teacher's encoders": 10,
        "diffusion model, while the teacher works": 20,
        "embeddings": 5,
        "a checkpoint, while it is saved": 99,
    }
    check_ram(parts, 30, processes=1)
    check_ram(parts, 60, processes=2)
    with pytest.raises(ValueError, match=r"the 2 processes on this machine need(.|\n)*teacher's encoders(.|\n)*\"fp8_e4m3fn\"\.$"):
        check_ram(parts, 59, processes=2)
    with pytest.raises(ValueError, match=r"the run needs(.|\n)*embeddings(.|\n)*or lower teacher\.chunk_prompts\.$"):
        check_ram(parts | {"embeddings": 11}, 30, processes=1)
