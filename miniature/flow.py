"""Flow matching on the frozen teacher's embeddings, which trains the diffusion models: what a step draws, and its loss.

The guidance of each sample is drawn from GUIDANCE independently of its image, so a model that takes it learns to accept any value and to
ignore it. (Flux.1-dev was distilled to use guidance; here the caption determines the image, so there is nothing to amplify.)
"""

# B batch, C H W latent, L text tokens, D text width

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from ..world.captions import draw_prompt
from ..world.pictures import Scene, render
from ..world.scenes import random_of
from .autoencoder import RGB, latents

GUIDANCE = (1.0, 6.0)
# The other 13 channels are constant: easy to predict, and four fifths of an unweighted loss.
IDLE_CHANNEL_WEIGHT = 0.05
BATCHES = 1_000
# Noisy latent [B, C, H, W], noise level [B], text [B, L, D], guidance [B] -> velocity [B, C, H, W].
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionModel:
    """One of the miniature's diffusion models: how it is made, trained and saved.

    make: an untrained one for a text width and a seed. predict: its velocity, of the module and what Velocity takes. names: the published
    name of a weight. shift: of its noise levels. scale, offset: ComfyUI gives it the latents of `autoencoder.latents` times scale plus
    offset. empty_share: the share of samples whose caption is empty, which classifier-free guidance needs (arXiv:2207.12598).
    """

    family: str
    title: str
    size: Any
    make: Callable[[Any, int, int], Module]
    predict: Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
    shift: float
    scale: float = 1.0
    offset: float = 0.0
    empty_share: float = 0.0
    published_name: Callable[[str], str] = str

    @property
    def facts(self) -> dict[str, Any]:
        """What decides its training, beside the plan."""
        drawn = {name: getattr(self, name) for name in ("scale", "offset", "empty_share")} if self.empty_share else {}
        return {self.family: asdict(self.size), "shift": self.shift, **drawn}

    def save(self, path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, str], dtype: torch.dtype) -> Path:
        """Write weights under the published names, which the stock UNETLoader reads."""
        named = {self.published_name(name): tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}
        safetensors.torch.save_file(named, path, metadata={"modelspec.title": self.title, **facts})
        return path


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


def draw_batch(model: DiffusionModel, seed: int, step: int, batch: int, shown: Callable[[Scene], Scene] = as_asked) -> FlowBatch:
    """The samples of step `step`, a pure function of the arguments. Noise levels are stratified over the batch.

    Captions repeat after BATCHES steps, with other noise, so that their embeddings can be cached.
    `shown` maps the scene of a caption to the scene that the image shows.
    """
    first = step % BATCHES * batch
    prompts = [draw_prompt(seed, index, "train") for index in range(first, first + batch)]
    images_BHWC = torch.from_numpy(np.stack([render(shown(scene)) for scene, _ in prompts]))
    generator = torch.Generator().manual_seed((seed << 32) ^ step)
    clean_BCHW = latents(images_BHWC) * model.scale + model.offset
    noise_BCHW = torch.randn(clean_BCHW.shape, generator=generator)
    uniform_B = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    low, high = GUIDANCE
    guidance_B = low + (high - low) * torch.rand(batch, generator=generator)
    # Like the captions, which of them are empty repeats after BATCHES steps.
    chances = random_of(seed, "empty", first)
    captions = ["" if chances.random() < model.empty_share else caption for _, caption in prompts]
    return FlowBatch(clean_BCHW, noise_BCHW, shifted(uniform_B, model.shift), guidance_B, captions)


def shifted(t_B: Tensor, shift: float) -> Tensor:
    """Noise levels above 0 for times from 0 to 1, shifted as Flux's are (black-forest-labs/flux, sampling.time_shift)."""
    t_B = t_B.clamp(1e-4, 1.0)
    return math.exp(shift) / (math.exp(shift) + (1 / t_B - 1))


def flow_loss(predicted_BCHW: Tensor, batch: FlowBatch) -> Tensor:
    """Weighted mean squared error of the velocity, which is noise minus clean latent (rectified flow, arXiv:2209.03003)."""
    velocity_BCHW = (batch.noise_BCHW - batch.clean_BCHW).to(predicted_BCHW.device)
    error_C = (predicted_BCHW.float() - velocity_BCHW).square().mean(dim=(0, 2, 3))
    weight_C = torch.full_like(error_C, IDLE_CHANNEL_WEIGHT)
    weight_C[list(RGB)] = 1.0
    return (error_C * weight_C).sum() / weight_C.sum()


def loss_of(predict: Velocity, teacher: Callable[[list[str]], Tensor], batch: FlowBatch, device: torch.device) -> Tensor:
    """The loss of a batch, differentiable with respect to the weights behind `predict`."""
    sigma_B111 = batch.sigma_B.view(-1, 1, 1, 1)
    x_BCHW = ((1 - sigma_B111) * batch.clean_BCHW + sigma_B111 * batch.noise_BCHW).to(device)
    text_BLD = teacher(batch.captions).to(device)
    return flow_loss(predict(x_BCHW, batch.sigma_B.to(device), text_BLD, batch.guidance_B.to(device)), batch)
