"""Sampling by Euler's method: the one step and the one loop of trainer, previews and evaluation.

Equal, bit for bit, to ComfyUI's KSampler with sampler `euler` and scheduler `simple` at CFG 1.
"""

# B batch, C channels (... any number of dimensions), L text tokens, D text width, T steps

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .frozen import FrozenModel

# Called with the number of a step, from 0, and the latent [B, C, ...] at its start.
OnStep = Callable[[int, Tensor], None]


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Move a latent [B, C, ...] along a velocity from one noise level to the next. For models that predict noise this is DDIM, eta 0."""
    return x + velocity * (sigma_next - sigma).to(x)


@torch.no_grad()
def denoise(
    model: FrozenModel,
    noise: Tensor,
    sigmas_T: Tensor,
    text_BLD: Tensor,
    extras: Mapping[str, Any],
    guidance_B: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The latent [B, C, ...] that a KSampler makes of this noise, as a VAE takes it. The model must be on its device.

    `text_BLD` and `extras` are a conditioning entry; `guidance_B` gives each sample a guidance of its own.
    """
    sigmas_T = sigmas_T.to(model.device)
    x = model.noisy(noise.to(model.device, torch.float32), sigmas_T)
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas_T)):
        if on_step is not None:
            on_step(step, x)
        x = euler_step(x, model.velocity(x, sigma.expand(len(x)), text_BLD, extras, guidance_B), sigma, sigma_next)
    return model.decodable(x, sigmas_T)
