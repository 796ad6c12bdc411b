"""The diffusion model: a Flux of ComfyUI's own module, small, trained by flow matching on the frozen teacher's embeddings.

Guidance: every sample gets a guidance value drawn evenly from GUIDANCE that says nothing about its picture, so the model learns to take any
value and to ignore it. (Flux.1-dev learnt by distillation to act on it; here captions settle the picture, and there is nothing to amplify.)
"""

# B batch, C H W latent, L text tokens, D text width, P pooled width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
# Noise levels are drawn evenly and shifted towards noise, where layout and letters are settled; further than the host shifts Flux (1.15).
SHIFT = 1.6
# The other 13 channels are constant: easy, and in an even loss four fifths of what the model looks at.
IDLE_CHANNEL_WEIGHT = 0.05
BATCHES = 1_000
# A noisy latent [B, C, H, W], noise levels [B], text [B, L, D] and guidance [B] to the velocity [B, C, H, W].
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FluxSize:
    """Width (a multiple of 128, the width of a head) and depth."""

    width: int = 128
    double_blocks: int = 2
    single_blocks: int = 6


def make_flux(size: FluxSize, text_width: int, seed: int) -> Module:
    """An untrained Flux, float32, of the very config that ComfyUI reads off its file; gates and output begin at zero."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.model_detection import detect_unet_config

    if size.width % HEAD_WIDTH:
        raise ValueError(f"A Flux of width {size.width} cannot be: a head is {HEAD_WIDTH} wide.\nWhat to do: give a multiple of it.")
    weights = drawn(FluxLayout(size.width, size.double_blocks, size.single_blocks, text_width).tensors(), seed)
    silent = ("mod.lin.", "modulation", "final_layer.linear.")
    weights = {name: torch.zeros_like(weight) if any(part in name for part in silent) else weight for name, weight in weights.items()}
    config = detect_unet_config(weights, "")
    config.pop("disable_unet_model_creation", None)
    flux = Flux(**config, dtype=torch.float32, device=torch.device("cpu"), operations=comfy.ops.disable_weight_init)
    flux.load_state_dict(host_names(weights, flux), strict=True)
    return flux


def host_names(weights: Mapping[str, Tensor], flux: Module) -> dict[str, Tensor]:
    """Norms are called `.scale` in published files and older hosts, `.weight` in newer ones."""
    wanted = flux.state_dict().keys()
    return {name if name in wanted else name.removesuffix(".scale") + ".weight": weight for name, weight in weights.items()}


def load_weights(flux: Module, path: Path) -> None:
    """Give a Flux the weights of a file of the miniature. Raises ValueError if they are of another size."""
    weights = {name: tensor.float() for name, tensor in safetensors.torch.load_file(path).items()}
    try:
        flux.load_state_dict(host_names(weights, flux), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} is no Flux of this size: {error}\nWhat to do: start from a file that the miniature made.") from error


@dataclass(frozen=True)
class Batch:
    """Clean latents, noise, noise levels, guidance, captions of one step."""

    clean_BCHW: Tensor
    noise_BCHW: Tensor
    sigma_B: Tensor
    guidance_B: Tensor
    captions: list[str]


def draw_batch(seed: int, step: int, batch: int, shown: Callable[[Scene], Scene] = lambda scene: scene) -> Batch:
    """What step `step` trains on: a function of its arguments alone. Noise levels are spread evenly over the batch (stratified).

    After BATCHES steps the captions come again, with other noise, so that their embeddings can be kept.

    `shown` makes of the scene that a caption asks for the one that its picture shows.
    """
    first = step % BATCHES * batch
    prompts = [draw_prompt(seed, index, "train") for index in range(first, first + batch)]
    pictures_BHWC = torch.from_numpy(np.stack([render(shown(scene)) for scene, _ in prompts]))
    generator = torch.Generator().manual_seed((seed << 32) ^ step)
    clean_BCHW = latents(pictures_BHWC)
    noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator)
    even_B = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    low, high = GUIDANCE
    guidance_B = low + (high - low) * torch.rand(batch, generator=generator)
    return Batch(clean_BCHW, noise_BCHW, shifted(even_B), guidance_B, [caption for _, caption in prompts])


def shifted(t_B: Tensor) -> Tensor:
    """Noise levels of times from 0 to 1 under Flux's shift; never 0 (black-forest-labs/flux, sampling.time_shift)."""
    t_B = t_B.clamp(1e-4, 1.0)
    return math.exp(SHIFT) / (math.exp(SHIFT) + (1 / t_B - 1))


def flow_loss(predicted_BCHW: Tensor, batch: Batch) -> Tensor:
    """Weighted mean square of the velocity's error; the velocity is noise minus clean latent (rectified flow, arXiv:2209.03003)."""
    velocity_BCHW = (batch.noise_BCHW - batch.clean_BCHW).to(predicted_BCHW.device)
    error_C = (predicted_BCHW.float() - velocity_BCHW).square().mean(dim=(0, 2, 3))
    weight_C = torch.full_like(error_C, IDLE_CHANNEL_WEIGHT)
    weight_C[list(RGB)] = 1.0
    return (error_C * weight_C).sum() / weight_C.sum()


def loss_of(predict: Velocity, teacher: Callable[[list[str]], Tensor], batch: Batch, device: torch.device) -> Tensor:
    """The loss of a batch, with gradients to the weights of `predict`."""
    sigma_B111 = batch.sigma_B.view(-1, 1, 1, 1)
    x_BCHW = ((1 - sigma_B111) * batch.clean_BCHW + sigma_B111 * batch.noise_BCHW).to(device)
    text_BLD = teacher(batch.captions).to(device)
    return flow_loss(predict(x_BCHW, batch.sigma_B.to(device), text_BLD, batch.guidance_B.to(device)), batch)


def save_flux(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, str], dtype: torch.dtype) -> Path:
    """Write the Flux with the published names, as the stock UNETLoader takes it."""
    named = {published_name(name): tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(named, path, metadata={"modelspec.title": "miniature Flux", **facts})
    return path


def published_name(name: str) -> str:
    """The name of a weight in published files."""
    return name.removesuffix(".weight") + ".scale" if name.endswith(("query_norm.weight", "key_norm.weight")) else name
