"""Gradients with respect to the text are right for every kind of model, with block checkpointing and without."""

from __future__ import annotations

import comfy.ldm.common_dit
import comfy.model_management
import pytest
import torch
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.diffusion.gradients import blocks_of, differentiable
from distilled_t5.families import FAMILIES
from distilled_t5.tests.support.small_models import BLOCK_LISTS, SMALL_MODELS
from torch import Tensor


def gradient(model: FrozenModel, name: str, checkpoint_blocks: bool) -> tuple[Tensor, Tensor]:
    """A velocity, and the gradient of its square with respect to the text."""
    x, sigma_B, text_BLD, extras = SMALL_MODELS[name].inputs()
    text_BLD.requires_grad_(True)
    inner = model.model.diffusion_model
    with differentiable(inner, blocks_of(inner, BLOCK_LISTS[name]), checkpoint_blocks):
        velocity = model.velocity(x, sigma_B, text_BLD, extras)
        velocity.square().sum().backward()
    assert text_BLD.grad is not None
    return velocity.detach(), text_BLD.grad


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    model = FrozenModel(SMALL_MODELS[name].patcher(), FAMILIES["flux"])
    model.load()
    (plain, expected), (checkpointed, found) = (gradient(model, name, checkpoint_blocks) for checkpoint_blocks in (False, True))
    assert torch.equal(checkpointed, plain)
    assert expected.norm() > 0
    if name == "flux":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_gradients_equal_the_numeric_derivative(name: str) -> None:
    model = FrozenModel(SMALL_MODELS[name].patcher(), FAMILIES["flux"])
    model.load()
    _, found = gradient(model, name, True)
    x, sigma_B, text_BLD, extras = SMALL_MODELS[name].inputs()
    steepest = found / found.norm()
    length = 0.02 * float(text_BLD.norm()) / text_BLD.shape[1] ** 0.5

    @torch.no_grad()
    def loss(shift: Tensor) -> float:
        return float(model.velocity(x, sigma_B, text_BLD + shift, extras).double().square().sum())

    numeric = (loss(length * steepest) - loss(-length * steepest)) / (2 * length)
    assert float(found.norm()) == pytest.approx(numeric, rel=1e-2)


def test_everything_is_left_as_it_was() -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    inner = SMALL_MODELS["flux"].patcher().model.diffusion_model
    functions = {name: value for name, value in vars(kitchen).items() if "rope" in name}
    norm, training = comfy.ldm.common_dit.rms_norm, comfy.model_management.in_training
    with differentiable(inner, blocks_of(inner, BLOCK_LISTS["flux"]), checkpoint_blocks=True):
        assert comfy.ldm.common_dit.rms_norm is not norm and comfy.model_management.in_training
    assert {name: value for name, value in vars(kitchen).items() if "rope" in name} == functions
    assert comfy.ldm.common_dit.rms_norm is norm and comfy.model_management.in_training == training
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in inner.modules())
