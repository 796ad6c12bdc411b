"""Block checkpointing on a real Flux: the very gradient, less memory, and no more arithmetic than it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.diffusion.gradients import blocks_of, differentiable
from distilled_t5.families import FAMILIES
from distilled_t5.tests.support.training_worlds import TrainingWorld, small_world
from distilled_t5.train.trajectory import draw
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

WORLD = small_world(128, 2, 3, side_px=64, text_tokens=24)
BATCH = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    WORLD.write(folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def flow(files: Path) -> FrozenModel:
    flow = WORLD.load_flow(files)
    flow.load()
    return flow


def given(world: TrainingWorld = WORLD) -> dict[str, Any]:
    """All that a velocity depends on but the text."""
    drawn = draw(0, 0, BATCH, FAMILIES["flux"].latent_shape(world.side_px), (2.0, 5.0), (world.text_tokens,))
    pooled_BP = torch.randn(BATCH, world.flux.pooled_width, generator=torch.Generator().manual_seed(1))
    assert drawn.guidance_B is not None
    extras, sigma_B = {"pooled_output": pooled_BP}, torch.tensor([0.9, 0.4])
    return {"x": drawn.noise, "sigma_B": sigma_B, "extras": extras, "guidance_B": drawn.guidance_B}


def text() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH, WORLD.text_tokens, WORLD.flux.text_width, generator=generator).requires_grad_(True)


def gradients(velocity: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A velocity, and the gradient of its square with respect to the text."""
    text_BLD = text()
    result = velocity(text_BLD)
    result.float().square().sum().backward()
    assert text_BLD.grad is not None
    return result.detach(), text_BLD.grad


def flops(action: Callable[[], Any]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        result = action()
    return counter.get_total_flops(), result


def test_velocity_and_gradient_are_those_without_checkpointing_to_the_last_bit(flow):
    found = []
    for checkpoint_blocks in (False, True):
        with flow.differentiable(checkpoint_blocks):
            found.append(gradients(lambda text_BLD: flow.velocity(text_BLD=text_BLD, **given())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].abs().max() > 0


def test_gradients_are_the_same_through_weights_that_are_cast_for_every_use(files):
    """As fp8 and bf16 files are on a card, here with bf16 weights of which the CPU computes in float32."""
    flow = WORLD.load_flow(files, "bf16")
    flow.load()
    assert flow.model.diffusion_model.single_blocks[0].linear2.weight.dtype == torch.bfloat16
    found = []
    for checkpoint_blocks in (False, True):
        with flow.differentiable(checkpoint_blocks):
            found.append(gradients(lambda text_BLD: flow.velocity(text_BLD=text_BLD, **given())))
    assert torch.equal(found[0][1], found[1][1])


def test_what_overflows_in_float16_and_is_cut_off_has_no_gradient_with_checkpointing_and_without(flow):
    """ComfyUI replaces values that are not finite, which have no gradient, so the last products of a block are computed again here."""
    model = copy.deepcopy(flow.model.diffusion_model).half()
    with torch.no_grad():
        model.double_blocks[0].txt_mlp[2].bias[:1] = float("inf")
    inputs = given()
    x, sigma_B, pooled_BP, guidance_B = (
        value.half() for value in (inputs["x"], inputs["sigma_B"], inputs["extras"]["pooled_output"], inputs["guidance_B"])
    )

    def velocity(text_BLD: Tensor) -> Tensor:
        return model(x, sigma_B, text_BLD.half(), y=pooled_BP, guidance=guidance_B)

    found = []
    for checkpoint_blocks in (False, True):
        with differentiable(model, blocks_of(model, FAMILIES["flux"].block_lists), checkpoint_blocks, FAMILIES["flux"].last_layers):
            found.append(gradients(velocity))
    assert found[0][0].isfinite().all()
    assert torch.equal(found[0][1], found[1][1])


def test_the_last_products_of_blocks_are_not_computed_again(flow):
    backward = {}
    for checkpoint_blocks in (False, True):
        with flow.differentiable(checkpoint_blocks):
            result = flow.velocity(text_BLD=text(), **given())
            backward[checkpoint_blocks], _ = flops(lambda result=result: result.square().sum().backward())
    again = (backward[True] - backward[False]) / BATCH
    flux, tokens = WORLD.flux, WORLD.text_tokens + (WORLD.side_px // 16) ** 2
    forward = flops(lambda: flow.velocity(text_BLD=text().detach(), **given()))[0] / BATCH
    expected = forward - 2 * tokens * flux.width**2 * (4 * flux.double + 5 * flux.single)
    # The embedders and the last layer, a few percent of the operations, are not in blocks.
    assert 0.9 * expected < again < expected
    assert again < 0.65 * forward


def test_an_error_while_computing_again_leaves_the_model_as_it_was(flow):
    model = flow.model.diffusion_model
    with flow.differentiable(checkpoint_blocks=True):
        result = flow.velocity(text_BLD=text(), **given())
        failing = model.single_blocks[1].norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            result.sum().backward()
        failing.remove()
    assert not any("forward" in vars(module) for module in model.modules())
