"""On the practice accelerator: a rehearsal against the memory and the operations of the real step.

`test_practice_accelerator.py` runs these in a process of their own.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import pytest
import torch
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support import practice_accelerator as practice
from distilled_t5.tests.support.flops import flop_counter
from distilled_t5.tests.support.trainer import teacher_of
from distilled_t5.train.distill import train_step
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.workshop import open_workshop

SMALL_STUDENT = "student.layout={d_model=64, d_ff=128, num_layers=2, num_heads=2, d_kv=32, gated=true}"
BF16, FP8 = "diffusion_model.dtype=bf16", "diffusion_model.dtype=fp8_e4m3fn"
KEPT, MIXED = "diffusion_model.checkpoint_blocks=false", "optimizer.autocast=bf16"


def objective(name: str, blocks: int = 0) -> list[str]:
    """The settings of a run of which both stages have this objective."""
    return [f"stage.{number}.{key}={value}" for number in (0, 1) for key, value in {"objective": name, "blocks": blocks}.items()]


# Family, resolution, batch, accumulate, settings.
CONFIGURATIONS = {
    "flux": ("flux", 256, 2, 1, []),
    "flux in bf16, mixed precision": ("flux", 256, 1, 2, [BF16, MIXED]),
    "flux in fp8": ("flux", 256, 4, 1, [FP8, MIXED]),
    "flux in fp8, activations kept": ("flux", 256, 2, 2, [FP8, KEPT]),
    "flux, activations kept": ("flux", 128, 8, 1, [KEPT, MIXED]),
    "sd3 in bf16": ("sd3", 256, 2, 1, [BF16, MIXED]),
    "sd3, activations kept": ("sd3", 256, 2, 1, [KEPT]),
    "pixart alpha": ("pixart_alpha", 384, 2, 1, [MIXED]),
    "pixart sigma in bf16": ("pixart_sigma", 384, 1, 2, [BF16]),
    "chroma in bf16": ("chroma", 256, 2, 1, [BF16, MIXED]),
    "flux, early": ("flux", 256, 2, 1, [*objective("early", 1), MIXED]),
    "sd3, text_stream": ("sd3", 256, 2, 1, [*objective("text_stream", 1), MIXED]),
    "pixart, keys_values": ("pixart_alpha", 384, 2, 1, [*objective("keys_values"), MIXED]),
    "flux, projected": ("flux", 256, 2, 1, [*objective("projected"), MIXED]),
}


# One of each kind: precisions, activations computed again or kept, guidance with two texts, text that is not padded, an early end.
QUICK = ("flux in bf16, mixed precision", "flux in fp8, activations kept", "sd3 in bf16", "pixart alpha", "flux, early", "flux, projected")


def recipe_of(name: str) -> Recipe:
    family, side, batch, accumulate, settings = CONFIGURATIONS[name]
    guided = ["sampling.guidance=[]", "sampling.cfg=[4.0]"]
    stage = {"resolution_px": side, "batch": batch, "accumulate": accumulate, "objective": "velocity"}
    return load_recipe(
        "smoke",
        [
            SMALL_STUDENT,
            f"diffusion_model.family={family}",
            "sampling.token_lengths=[64]",
            "validation.prompts=2",
            "student.dropout=0.1",
            *(guided if family != "flux" else []),
            *(f"stage.{number}.{key}={value}" for number in (0, 1) for key, value in stage.items()),
            *settings,
        ],
    )


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is there already, modules above all, is not looked through each time."""
    comfy.model_management.unload_all_models()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _collect(*_step: object) -> None:
    gc.collect()


def _make_running_means(optimizer: Any) -> None:
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.full] * (name not in QUICK)) for name in CONFIGURATIONS])
def test_the_rehearsed_peak_is_that_of_the_real_step_and_so_are_the_operations(name):
    comfy.model_management.unload_all_models()
    gc.collect()
    others = practice.memory.allocated
    workshop = open_workshop(recipe_of(name), Ranks())
    rehearsal = workshop.rehearsal
    assert rehearsal is not None and rehearsal.on_gpu
    stage = workshop.recipe.stages[0]
    batches = workshop.schedule.batches(0, 0)
    # A prompt that fills its length, as the rehearsal has it.
    texts = [workshop.teacher.encode(["word " * 100] * stage.batch, 64, with_empty=batch.drawn.cfg_B is not None) for batch in batches]
    objective = workshop.objective(0)
    teacher_of(workshop).clip.patcher.detach()
    positions = workshop.starts(batches, texts, workshop.recipe.sampling.steps)
    del texts
    # What is only held by reference cycles is there or not, as Python's collector likes.
    workshop.learner.optimizer.register_step_pre_hook(_collect)
    _make_running_means(workshop.learner.optimizer)
    gc.collect()
    practice.reset_peak()
    with workshop.model.differentiable(workshop.recipe.diffusion_model.checkpoint_blocks), flop_counter() as counted:
        train_step(positions, workshop.model, workshop.learners, objective)
    peak = practice.memory.peak - others
    assert -0.02 <= rehearsal.total / peak - 1 <= 0.05, (rehearsal.total, peak, rehearsal.largest.need)
    operations = sum(rehearsal.largest.flops.values())
    # `early` has fewer at the last step of a trajectory.
    assert operations < counted.get_total_flops() if objective.at == "streams" else operations == counted.get_total_flops()
