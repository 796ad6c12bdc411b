"""How much of a GPU the host is told to keep free for a step of training."""

from __future__ import annotations

import pytest
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.step_memory import step_memory_bytes

# Flux.1: 19 double and 38 single blocks of 3072 channels.
BLOCKS, WIDTH = 57, 3072
T5_BASE = 130_000_000


def step_gb(name: str, *settings: str, has_moments: bool = False) -> float:
    return step_memory_bytes(load_recipe(name, settings), BLOCKS, WIDTH, T5_BASE, has_moments) / 1e9


# What stands in the recipes: inputs of the blocks, inside of a block, gradients and moments, other.
@pytest.mark.parametrize(
    ("name", "parts_gb"),
    [("schnell-24gb", (1.8, 1.5, 1.6, 1.5)), ("schnell-16gb", (0.9, 0.8, 1.6, 1.5)), ("schnell-12gb", (0.4, 0.3, 1.6, 1.5))],
)
def test_it_is_the_sum_that_the_recipe_states(name, parts_gb):
    assert step_gb(name) == pytest.approx(sum(parts_gb), rel=0.05)


def test_without_checkpointing_the_inside_of_every_block_is_kept():
    kept = step_gb("schnell-24gb", "diffusion_model.checkpoint_blocks=false")
    assert kept == pytest.approx(57 * 1.5 + 1.6 + 1.5, rel=0.1)


def test_moments_that_are_there_already_need_no_room():
    assert step_gb("schnell-24gb") - step_gb("schnell-24gb", has_moments=True) == pytest.approx(8 * T5_BASE / 1e9)


def test_it_is_the_largest_stage_that_counts():
    assert step_gb("flux-dev-paper") == pytest.approx(step_gb("flux-dev-paper", "stage.0.resolution_px=256"))
    assert step_gb("flux-dev-paper", "stage.1.resolution_px=512") < step_gb("flux-dev-paper") / 2
