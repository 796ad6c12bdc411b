"""On the practice accelerator: the trainer. `test_practice_accelerator.py` runs these in a process of their own."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import pytest
import torch
from distilled_t5.diffusion.frozen import usable_bytes
from distilled_t5.runtime.model_folders import add_model_folders
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support import practice_accelerator as practice
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.trainer import metrics, teacher_of
from distilled_t5.train.__main__ import recipe_for_this_gpu
from distilled_t5.train.distill import train_step
from distilled_t5.train.estimate import estimate
from distilled_t5.train.objectives import OBJECTIVES
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.run import train
from distilled_t5.train.state import TrainerState, read_checkpoint
from distilled_t5.train.workshop import Workshop, open_workshop

# With so little, ComfyUI leaves the diffusion model in RAM while the student trains.
LITTLE_BYTES = 1_200_000_000
LENGTH = ["stage.0.steps=2", "stage.1.steps=4", "validation.prompts=2"]
QUICK = [*LENGTH, "sampling.steps=4", "sampling.token_lengths=[16]"]
OFTEN = ["checkpoints.every_steps=2", "checkpoints.keep_last=9", "preview.every_steps=6", "validation.every_steps=3"]
PREVIEW = ['preview.prompts=["a red heart"]', "preview.vae=miniature_vae.safetensors"]
# They imitate and follow. Dropout draws on the device.
RUNS = {
    "smoke": [*QUICK, "student.dropout=0.1", "optimizer.autocast=bf16"],
    "miniature-quick": [
        *(f"stage.{number}.{setting}" for number in range(3) for setting in ("steps=2", "batch=4")),
        *("validation.prompts=2", "student.dropout=0.1", "optimizer.warmup_steps=2"),
    ],
}


@pytest.fixture(autouse=True)
def free_device() -> Iterator[None]:
    comfy.model_management.unload_all_models()
    yield
    practice.set_budget(None)


@pytest.fixture(scope="module", params=["smoke", pytest.param("miniature-quick", marks=pytest.mark.full)])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    add_model_folders()
    return load_recipe(request.param, [*RUNS[request.param], *OFTEN, *PREVIEW])


@pytest.fixture(scope="module")
def done(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on a device with plenty of memory."""
    run = tmp_path_factory.mktemp("done") / "run"
    assert train(recipe, run, False, Ranks()) is not None
    return run


def state(run: Path, step: int) -> TrainerState:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def test_a_run_reports_its_device_the_peak_of_its_memory_the_held_out_loss_and_images(done):
    assert re.search(r"Diffusion model  .* on npu:0", (done / "train.log").read_text(encoding="utf-8"))
    rows = metrics(done)
    assert all(0 < row["gpu_peak_mb"] < 1000 for row in rows if "gpu_peak_mb" in row) and any("gpu_peak_mb" in row for row in rows)
    assert any(math.isfinite(row["held_out_loss"]) for row in rows if "held_out_loss" in row)
    assert list((done / "samples").glob("*"))


def test_a_resumed_run_ends_with_the_same_bits_though_its_device_has_little_memory(done, recipe, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    practice.set_budget(LITTLE_BYTES)
    train(recipe, tmp_path / "run", True, Ranks())
    ours, theirs = state(tmp_path / "run", 6), state(done, 6)
    for part in ("student", "optimizer", "rng", "position", "best"):
        assert same(getattr(ours, part), getattr(theirs, part)), part


def test_the_state_of_the_devices_random_numbers_is_saved(done):
    saved = [state(done, step).rng["0"]["npu"][0] for step in (2, 4, 6)]
    assert not torch.equal(saved[0], saved[1])
    assert not torch.equal(saved[1], saved[2])


def opened(*more: str) -> tuple[Workshop, list[Any]]:
    """What a process of the run works with, and the start of a trajectory of the last stage."""
    workshop = open_workshop(load_recipe("smoke", [*QUICK, *more]), Ranks())
    place = workshop.schedule.place(workshop.schedule.total_steps - 1)
    return workshop, workshop.starts_at(workshop.schedule.place(workshop.schedule.total_steps - 1 - place.step))


def stepped(workshop: Workshop, positions: list[Any]) -> Any:
    with workshop.model.differentiable(workshop.recipe.diffusion_model.checkpoint_blocks):
        [report], moved = train_step(positions, workshop.model, workshop.learners, OBJECTIVES["velocity"])
        return report, moved


def test_teacher_and_diffusion_model_change_places_on_a_device_with_little_memory():
    practice.set_budget(LITTLE_BYTES)
    workshop, positions = opened()
    assert teacher_of(workshop).clip.patcher.loaded_size() == 0
    report, _ = stepped(workshop, positions)
    assert workshop.model.patcher.loaded_size() < workshop.model.patcher.model_size()
    practice.set_budget(None)
    workshop, positions = opened()
    assert stepped(workshop, positions)[0] == report


def test_the_teacher_is_off_the_device_again_when_its_variance_is_known():
    practice.set_budget(LITTLE_BYTES)
    workshop = open_workshop(load_recipe("smoke", [*QUICK, "stage.0.objective=projected"]), Ranks())
    workshop.starts_at(workshop.schedule.place(0))
    workshop.objective(0)
    assert teacher_of(workshop).clip.patcher.loaded_size() == 0


def test_a_diffusion_model_in_fp16_is_computed_in_fp16_and_its_loss_is_scaled():
    workshop, positions = opened("diffusion_model.dtype=fp16")
    assert workshop.model.compute_dtype == torch.float16
    assert workshop.learner.scaler.is_enabled()
    before = {name: weight.clone() for name, weight in workshop.student.tensors().items()}
    report, _ = stepped(workshop, positions)
    assert not report.dropped
    exact, positions = opened("diffusion_model.dtype=fp32")
    expected, _ = stepped(exact, positions)
    assert report.loss == pytest.approx(expected.loss, rel=0.02)
    assert report.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.05)
    assert not same(workshop.student.tensors(), before)


def test_without_a_recipe_the_estimate_is_of_the_overnight_recipe_for_the_memory_of_the_device():
    practice.set_budget(17_000_000_000)
    assert recipe_for_this_gpu() == "flux-overnight-16gb"


def test_the_estimate_counts_the_memory_of_the_device():
    text = estimate(load_recipe("smoke", QUICK), Ranks())
    assert "Memory on npu:0" in text
    assert "gpu_peak_mb" in text


@pytest.mark.parametrize("checkpoint_blocks", ["true", "false"], ids=["checkpointed", "kept"])
def test_a_step_fits_into_the_memory_that_comfyui_is_asked_for_and_not_into_a_tenth_less(checkpoint_blocks, monkeypatch):
    workshop, positions = opened(f"diffusion_model.checkpoint_blocks={checkpoint_blocks}", "stage.1.resolution_px=256", "stage.1.batch=4")
    _, positions = stepped(workshop, positions)  # the optimizer has its running means from here on
    asked: list[int] = []
    monkeypatch.setattr(workshop.model, "load", asked.append)
    workshop.load_model()
    assert workshop.rehearsal is not None
    room = workshop.rehearsal.room(True, usable_bytes(workshop.model.device))
    assert asked[0] > room, "and what a GPU loses between tensors"
    if checkpoint_blocks == "false":
        # Where blocks are computed again, the peak is in a backward pass inside another, in which an error of Python ends the process.
        practice.set_budget(practice.memory.allocated + room * 9 // 10)
        with pytest.raises(torch.OutOfMemoryError):
            stepped(workshop, positions)
        workshop.learner.optimizer.zero_grad(set_to_none=True)
    before = practice.memory.peak = practice.memory.allocated
    practice.set_budget(before + room)
    stepped(workshop, positions)
    assert practice.memory.peak - before > room * 9 // 10
