"""What a run needs of memory: what is said when a device has less than its rehearsal counted, by hand."""

from __future__ import annotations

import dataclasses

import pytest
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.header import Entry
from distilled_t5.train.file_sizes import text_width_in
from distilled_t5.train.gpus import GPUS, gpu_named
from distilled_t5.train.memory import (
    Need,
    Rehearsal,
    StageRehearsal,
    check_memory,
    check_ram,
    ram_parts,
    shipped_advice,
    shipped_for,
    without_gpu,
)
from distilled_t5.train.recipe import load_recipe

GIB = 2**30
SCHNELL_WEIGHTS = 11_891_178_560
T5_XXL_FP16 = 9_524_621_312
BASE = 129_551_488
SMALL = StageRehearsal("small", 10, Need({"model": 100, "rest": 40}, {"rest": 55}, "rest"), {"bf16": 1e12}, {})
LARGE = StageRehearsal("large", 20, Need({"model": 100, "rest": 60}, {"rest": 80}, "rest"), {"bf16": 2e12}, {"fp32": 1e12})
ON_GPU = Rehearsal(
    [SMALL, LARGE],
    model=100,
    teacher=50,
    student=10,
    moments=20,
    parameters=BASE,
    text_width=4096,
    encoding=Need({"a": 1}, {"a": 1}, "a"),
    on_gpu=True,
)
ON_CPU = dataclasses.replace(ON_GPU, on_gpu=False)


def test_the_largest_stage_decides_and_offloading_leaves_out_the_model():
    assert (ON_GPU.largest.name, ON_GPU.total, ON_GPU.least) == ("large", 160, 80)
    assert LARGE.need.least_parts == {"rest": 80}


def test_on_a_cpu_everything_including_the_teacher_is_in_ram():
    assert (ON_CPU.total, ON_CPU.least) == (210, 210)


def test_with_a_cache_the_teacher_comes_before_the_training_and_either_may_be_what_does_not_fit():
    cached = dataclasses.replace(ON_CPU, cached=True)
    assert (cached.total, cached.teacher_beside, ON_CPU.teacher_beside, ON_GPU.teacher_beside) == (160, 0, 50, 0)
    with pytest.raises(ValueError, match="stage large needs") as refusal:
        check_memory(cached, 159, "cpu", str)
    assert "teacher's encoders" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"the teacher needs 0\.0 GB(.|\n)*teacher's encoders(.|\n)*its activations"):
        check_memory(dataclasses.replace(cached, encoding=Need({"a": 170}, {"a": 170}, "a")), 169, "cpu", str)


def test_a_model_that_is_cheaper_on_the_device_than_from_ram_stays_there():
    need = Need({"model": 1, "rest": 40}, {"rest": 55}, "rest")
    assert (need.total, need.least) == (41, 41)


def test_room_excludes_what_is_already_on_the_device():
    # The student's weights are there before the first step, the optimizer's means after it.
    assert ON_GPU.room(False, 1000) == 160 - 100 - 10
    assert ON_GPU.room(True, 1000) == 160 - 100 - 10 - 20


def test_weights_from_ram_need_room_for_copies():
    assert ON_GPU.room(True, 150) == 80 - 10 - 20
    assert ON_CPU.room(True, 150) == 160 - 100 - 10 - 20


def test_too_little_memory_is_refused_with_what_is_needed_what_is_there_and_advice():
    need = Need({"diffusion model, frozen": 24 * 10**9, "rest": 20 * 10**9}, {"rest": 21 * 10**9}, "rest")
    with pytest.raises(ValueError, match="Not enough memory on cuda:0") as refusal:
        check_memory(dataclasses.replace(ON_GPU, stages=[dataclasses.replace(LARGE, need=need)]), 16 * GIB, "cuda:0", lambda: "less.")
    message = str(refusal.value)
    assert "stage large needs 21.0 GB even with as much left in RAM as ComfyUI can; cuda:0 has 17.2 GB, of which a run can use" in message
    assert "21.000 GB" in message and "diffusion model, frozen" not in message
    assert message.splitlines()[-1] == "What to do: less."


def test_exactly_enough_memory_is_accepted_and_one_byte_less_is_refused():
    check_memory(ON_CPU, 210, "cpu", str)
    with pytest.raises(ValueError, match="teacher's encoders"):
        check_memory(ON_CPU, 209, "cpu", str)


def test_a_gpu_keeps_a_part_of_its_memory():
    check_memory(ON_GPU, 85, "cuda:0", str)
    with pytest.raises(ValueError, match="Not enough memory on cuda:0"):
        check_memory(ON_GPU, 84, "cuda:0", str)


def test_the_shipped_recipe_for_a_device_is_named():
    flux = FAMILIES["flux"]
    assert shipped_advice(flux, 16 * GIB, True) == "The shipped recipe flux-overnight-16gb is made for this much memory."
    assert shipped_advice(flux, 4 * GIB, True) == "No shipped recipe is made for so little memory."
    assert shipped_advice(FAMILIES["flux2_klein_9b"], 80 * GIB, True) == "No shipped recipe is made for FLUX.2 klein 9B."
    assert shipped_advice(flux, 4 * GIB, False) == "The shipped recipe smoke runs on any machine, but Flux.1 needs a GPU."


def test_the_largest_recipe_that_a_card_holds_is_named():
    # What cards of 8, 12, 16, 24 and 80 GB show.
    sizes = [8_363_704_320, 12_621_709_312, 16_892_723_200, 25_386_352_640, 85_024_112_640]
    assert [shipped_for(size, FAMILIES["flux"]) for size in sizes] == [None, *(f"flux-overnight-{size}gb" for size in (12, 16, 24, 24))]
    named = {family: shipped_for(sizes[-1], FAMILIES[family]) for family in ("sd3", "pixart_sigma", "chroma", "pixart_alpha")}
    assert named == {"sd3": "sd35-medium-24gb", "pixart_sigma": "pixart-sigma-24gb", "chroma": "chroma-24gb", "pixart_alpha": None}


def test_recipes_of_two_families_with_the_same_memory_size_do_not_hide_each_other():
    assert [shipped_for(25_386_352_640, FAMILIES[name]) for name in ("flux", "sd3")] == ["flux-overnight-24gb", "sd35-medium-24gb"]
    assert shipped_for(10**12, dataclasses.replace(FAMILIES["flux"], name="other")) is None


def test_parts_of_ram_beside_a_gpu_by_hand():
    recipe = load_recipe("schnell-24gb", ["teacher.chunk_prompts=64", "validation.prompts=10"])
    assert ram_parts(recipe, dataclasses.replace(ON_GPU, teacher=T5_XXL_FP16), 1, SCHNELL_WEIGHTS) == {
        "teacher's encoders": T5_XXL_FP16,
        "diffusion model, while the teacher works": SCHNELL_WEIGHTS,
        # 32 prompts make a trajectory, two of them a chunk.
        "teacher's embeddings of one chunk": 64 * 256 * 4096 * 4,
        "teacher's embeddings of held-out prompts": 10 * 256 * 4096 * 4,
        "a checkpoint, while it is saved": 12 * BASE,
    }


def test_each_of_several_processes_holds_models_of_its_own_and_its_share_of_the_prompts():
    recipe = load_recipe("schnell-24gb", ["teacher.chunk_prompts=1", "validation.prompts=10"])
    one, four = (ram_parts(recipe, ON_GPU, processes, ON_GPU.model) for processes in (1, 4))
    assert one["teacher's encoders"] == four["teacher's encoders"]
    assert one["teacher's embeddings of one chunk"] == 4 * four["teacher's embeddings of one chunk"] == 32 * 256 * 4096 * 4
    assert four["teacher's embeddings of held-out prompts"] == 4 * 256 * 4096 * 4, "batches of four are dealt out whole"


def test_training_without_a_gpu_is_said_in_days():
    long = dataclasses.replace(ON_CPU, stages=[dataclasses.replace(LARGE, steps=320_000, flops={"fp32": 27e12, "bf16": 3e12})])
    said = without_gpu(long, FAMILIES["flux"])
    assert f"about {320_000 * 30 / 86_400:,.0f} days at an assumed 1 TFLOP/s" in said
    assert said.startswith("No GPU is used") and "not practical" in said
    assert said.endswith("use a GPU; flux-overnight-12gb runs on 12 GB.")
    assert without_gpu(ON_CPU, FAMILIES["flux"]) == ""


def test_the_text_width_of_a_teacher_is_that_of_its_projection_or_else_of_its_token_table():
    table = {"shared.weight": Entry("F32", (32128, 128), 0, 0)}
    assert text_width_in([{}, table], FAMILIES["flux"]) == 128
    assert text_width_in([table | {"final_projection.3.weight": Entry("F32", (4096, 10), 0, 0)}], FAMILIES["flux"]) == 4096


def test_ram_beside_a_gpu_must_hold_both_models_and_then_one_with_the_embeddings():
    parts = {
        "teacher's encoders": 10,
        "diffusion model, while the teacher works": 20,
        "embeddings": 5,
        "a checkpoint, while it is saved": 99,
    }
    check_ram(parts, 30, 1, str)
    check_ram(parts, 60, 2, str)
    with pytest.raises(ValueError, match=r"the 2 processes on this machine need(.|\n)*teacher's encoders(.|\n)*What to do: less\.$"):
        check_ram(parts, 59, 2, lambda: "less.")
    with pytest.raises(ValueError, match=r"the run needs(.|\n)*embeddings(.|\n)*What to do: less\.$"):
        check_ram(parts | {"embeddings": 11}, 30, 1, lambda: "less.")


def test_gpus_are_found_by_name_however_it_is_written_and_others_are_listed():
    assert gpu_named("nvidia geforce rtx4090") is gpu_named("RTX 4090")
    with pytest.raises(UserError, match=r"GTX 1080 is not in the table of GPUs; expected one of RTX 3090.*\nWhat to do: "):
        gpu_named("GTX 1080")


def test_the_time_of_operations_is_that_of_their_formats_at_a_share_of_the_peak():
    gpu = gpu_named("RTX 4090")
    assert gpu.seconds({"bf16": 165.2e12}, 0.5) == pytest.approx(2)
    assert gpu.seconds({"fp32": 82.6e12, "fp8_e4m3fn": 330.3e12}, 1) == pytest.approx(2)
    assert gpu_named("A100").seconds({"fp8_e4m3fn": 312e12}, 1) == pytest.approx(1), "without fp8 in hardware, fp8 is multiplied in bf16"


def test_every_gpu_has_a_source_and_its_peaks_are_in_order():
    for gpu in GPUS:
        assert gpu.source and 8 <= gpu.memory_gb <= 200
        assert gpu.fp32 < gpu.bf16 < (gpu.fp8 or 2 * gpu.bf16) * 1.01
