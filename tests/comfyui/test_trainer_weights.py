"""Gradients through every form in which people keep a Flux: bf16, plain fp8, scaled fp8 (ComfyUI's quantised layers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import pytest
import torch
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.diffusion.partial_pass import streams_after
from distilled_t5.families import FAMILIES
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.tests.support.small_flux import FLUX
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
BATCH, TOKENS, STEP = 2, 20, 3.0


def bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def plain_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(FP8 if tensor.ndim == 2 else torch.bfloat16) for name, tensor in tensors.items()}


def scaled_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of attention and feed-forward with a scale each, as the files that people share have them."""
    written = bf16(tensors) | {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "_blocks." in name and "mod" not in name:
            scale = tensor.abs().max() / LARGEST
            written |= {name: (tensor / scale).to(FP8), name.replace(".weight", ".scale_weight"): scale}
    return written


@pytest.fixture(params=[bf16, plain_fp8, scaled_fp8], ids=lambda form: form.__name__)
def flow(request: pytest.FixtureRequest, tmp_path: Path) -> FrozenModel:
    save_file(request.param(drawn(FLUX.tensors(), seed=2)), tmp_path / "flux.safetensors")
    flow = FrozenModel(comfy.sd.load_diffusion_model(str(tmp_path / "flux.safetensors")), FAMILIES["flux"])
    quantised = quantised_layers(flow)
    assert bool(quantised) == (request.param is scaled_fp8)
    for layer in quantised:
        layer._full_precision_mm = False  # as on a card that multiplies in fp8
    flow.load()
    return flow


def quantised_layers(flow: FrozenModel) -> list[Any]:
    return [module for module in flow.model.diffusion_model.modules() if getattr(module, "layout_type", None)]


@pytest.mark.parametrize("early", [False, True], ids=["velocity", "early"])
@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_gradient_to_the_text_equals_the_numeric_derivative(flow: FrozenModel, checkpoint_blocks: bool, early: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in [(BATCH, 16, 8, 8), (BATCH, TOKENS, FLUX.text_width)])
    pooled, readout = torch.randn(BATCH, FLUX.pooled_width, generator=generator), torch.randn(x.shape, generator=generator)

    def velocity(text_BLD: Tensor) -> Tensor:
        return flow.velocity(x, torch.tensor([0.7, 0.3]), text_BLD, {"pooled_output": pooled}, torch.tensor([2.0, 4.0]))

    def measured(text_BLD: Tensor) -> Tensor:
        if not early:
            return (velocity(text_BLD) * readout).sum()
        streams, _ = streams_after(flow, 1, lambda: velocity(text_BLD), to_the_end=False)
        return torch.stack([(stream.float() * stream.float().sin()).sum() for stream in streams.values()]).sum()

    with flow.differentiable(checkpoint_blocks):
        [gradient] = torch.autograd.grad(measured(leaf := text.clone().requires_grad_(True)), leaf)
    steepest = gradient / gradient.norm()
    with torch.no_grad():
        numeric = float(measured(text + STEP * steepest) - measured(text - STEP * steepest)) / (2 * STEP)
    assert float(gradient.norm()) == pytest.approx(numeric, rel=0.01)
