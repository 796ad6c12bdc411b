"""The diffusion model: a small Flux, ComfyUI's own module, trained by flow matching on the frozen teacher's embeddings.

The guidance of each sample is drawn from GUIDANCE independently of its image, so the model learns to accept any value and to ignore it.
(Flux.1-dev was distilled to use guidance; here the caption determines the image, so there is nothing to amplify.)
"""

# B batch, C H W latent, L text tokens, D text width, P pooled width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from ..families.flux_tensors import HEAD_WIDTH, FluxLayout
from ..runtime.random_weights import drawn
from ..world.captions import draw_prompt
from ..world.pictures import Scene, render
from .autoencoder import RGB, latents

GUIDANCE = (1.0, 6.0)
# Noise levels are uniform, then shifted towards noise, where layout and letters form; ComfyUI shifts Flux by 1.15.
SHIFT = 1.6
# The other 13 channels are constant: easy to predict, and four fifths of an unweighted loss.
IDLE_CHANNEL_WEIGHT = 0.05
BATCHES = 1_000
# Noisy latent [B, C, H, W], noise level [B], text [B, L, D], guidance [B] -> velocity [B, C, H, W].
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FluxSize:
    """Width (a multiple of 128, the width of a head) and depth."""

    width: int = 128
    double_blocks: int = 2
    single_blocks: int = 6


def make_flux(size: FluxSize, text_width: int, seed: int) -> Module:
    """An untrained float32 Flux with the configuration that ComfyUI detects in its file. Modulations and output layer are zero.

    Raises ValueError if the width is not a multiple of HEAD_WIDTH.
    """
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.model_detection import detect_unet_config

    if size.width % HEAD_WIDTH:
        raise ValueError(f"{size.width} is not a valid width for a Flux.\nWhat to do: choose a multiple of {HEAD_WIDTH}.")
    weights = drawn(FluxLayout(size.width, size.double_blocks, size.single_blocks, text_width).tensors(), seed)
    zeroed = ("mod.lin.", "modulation", "final_layer.linear.")
    weights = {name: torch.zeros_like(weight) if any(part in name for part in zeroed) else weight for name, weight in weights.items()}
    config = detect_unet_config(weights, "")
    config.pop("disable_unet_model_creation", None)
    flux = Flux(**config, dtype=torch.float32, device=torch.device("cpu"), operations=comfy.ops.disable_weight_init)
    flux.load_state_dict(comfyui_names(weights, flux), strict=True)
    return flux


def comfyui_names(weights: Mapping[str, Tensor], flux: Module) -> dict[str, Tensor]:
    """Weights by the names in this ComfyUI: norms are `.scale` in published files and older versions, `.weight` in newer ones."""
    wanted = flux.state_dict().keys()
    return {name if name in wanted else name.removesuffix(".scale") + ".weight": weight for name, weight in weights.items()}


def load_weights(flux: Module, path: Path) -> None:
    """Load a file of the miniature into a Flux. Raises ValueError if the sizes differ."""
    weights = {name: tensor.float() for name, tensor in safetensors.torch.load_file(path).items()}
    try:
        flux.load_state_dict(comfyui_names(weights, flux), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a Flux of this size: {error}\nWhat to do: use a file that `miniature flux` made.") from error


@dataclass(frozen=True)
class FlowBatch:
    """The samples of one step: clean latents, noise, noise levels, guidance, captions."""

    clean_BCHW: Tensor
    noise_BCHW: Tensor
    sigma_B: Tensor
    guidance_B: Tensor
    captions: list[str]


def as_asked(scene: Scene) -> Scene:
    """The scene itself: the image shows what the caption asks for."""
    return scene


def draw_batch(seed: int, step: int, batch: int, shown: Callable[[Scene], Scene] = as_asked) -> FlowBatch:
    """The samples of step `step`, a pure function of the arguments. Noise levels are stratified over the batch.

    Captions repeat after BATCHES steps, with other noise, so that their embeddings can be cached.
    `shown` maps the scene of a caption to the scene that the image shows.
    """
    first = step % BATCHES * batch
    prompts = [draw_prompt(seed, index, "train") for index in range(first, first + batch)]
    images_BHWC = torch.from_numpy(np.stack([render(shown(scene)) for scene, _ in prompts]))
    generator = torch.Generator().manual_seed((seed << 32) ^ step)
    clean_BCHW = latents(images_BHWC)
    noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator)
    uniform_B = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    low, high = GUIDANCE
    guidance_B = low + (high - low) * torch.rand(batch, generator=generator)
    return FlowBatch(clean_BCHW, noise_BCHW, shifted(uniform_B), guidance_B, [caption for _, caption in prompts])


def shifted(t_B: Tensor) -> Tensor:
    """Noise levels above 0 for times from 0 to 1, with Flux's shift (black-forest-labs/flux, sampling.time_shift)."""
    t_B = t_B.clamp(1e-4, 1.0)
    return math.exp(SHIFT) / (math.exp(SHIFT) + (1 / t_B - 1))


def flow_loss(predicted_BCHW: Tensor, batch: FlowBatch) -> Tensor:
    """Weighted mean squared error of the velocity, which is noise minus clean latent (rectified flow, arXiv:2209.03003)."""
    velocity_BCHW = (batch.noise_BCHW - batch.clean_BCHW).to(predicted_BCHW.device)
    error_C = (predicted_BCHW.float() - velocity_BCHW).square().mean(dim=(0, 2, 3))
    weight_C = torch.full_like(error_C, IDLE_CHANNEL_WEIGHT)
    weight_C[list(RGB)] = 1.0
    return (error_C * weight_C).sum() / weight_C.sum()


def predictor(flux: Any) -> Velocity:
    """ComfyUI's Flux as a function; the pooled vector is zeros."""

    def predict(x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, guidance_B: Tensor) -> Tensor:
        pooled_BP = x_BCHW.new_zeros(len(x_BCHW), flux.params.vec_in_dim)
        return flux(x_BCHW, sigma_B, context=text_BLD, y=pooled_BP, guidance=guidance_B, transformer_options={})

    return predict


def loss_of(predict: Velocity, teacher: Callable[[list[str]], Tensor], batch: FlowBatch, device: torch.device) -> Tensor:
    """The loss of a batch, differentiable with respect to the weights behind `predict`."""
    sigma_B111 = batch.sigma_B.view(-1, 1, 1, 1)
    x_BCHW = ((1 - sigma_B111) * batch.clean_BCHW + sigma_B111 * batch.noise_BCHW).to(device)
    text_BLD = teacher(batch.captions).to(device)
    return flow_loss(predict(x_BCHW, batch.sigma_B.to(device), text_BLD, batch.guidance_B.to(device)), batch)


def save_flux(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, str], dtype: torch.dtype) -> Path:
    """Write the Flux under the published names, which the stock UNETLoader reads."""
    named = {published_name(name): tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(named, path, metadata={"modelspec.title": "miniature Flux", **facts})
    return path


def published_name(name: str) -> str:
    """A weight's name in published files."""
    return name.removesuffix(".weight") + ".scale" if name.endswith(("query_norm.weight", "key_norm.weight")) else name
