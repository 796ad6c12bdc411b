"""Sampling by Euler's method: the one step and the one loop of trainer, previews and evaluation.

Equal to ComfyUI's KSampler with sampler `euler` and scheduler `simple`: bit for bit at CFG 1, within rounding beyond, where ComfyUI may
compute both conditionings in one batch.
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
# A conditioning entry: text [B, L, D], and what stands beside it.
Entry = tuple[Tensor, Mapping[str, Any]]


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Move a latent [B, C, ...] along a velocity from one noise level to the next. For models that predict noise this is DDIM, eta 0."""
    return x + velocity * (sigma_next - sigma).to(x)


def guided(conditional: Tensor, unconditional: Tensor, cfg: Tensor | float) -> Tensor:
    """Classifier-free guidance, u + w (c - u), of two velocities [B, C, ...]; w is one number, or one per sample [B]."""
    weight = cfg.view(-1, *[1] * (conditional.ndim - 1)) if isinstance(cfg, Tensor) else cfg
    return unconditional + weight * (conditional - unconditional)


def for_batch(entry: Entry, batch: int) -> Entry:
    """A conditioning entry of one prompt, or of as many as there are samples, for a batch."""
    text_BLD, extras = entry

    def repeated(value: Any) -> Any:
        return value.expand(batch, *value.shape[1:]) if isinstance(value, Tensor) and len(value) == 1 else value

    return repeated(text_BLD), {name: repeated(value) for name, value in extras.items()}


@torch.no_grad()
def denoise(
    model: FrozenModel,
    noise: Tensor,
    sigmas_T: Tensor,
    text_BLD: Tensor,
    extras: Mapping[str, Any],
    guidance_B: Tensor | None = None,
    on_step: OnStep | None = None,
    cfg: float = 1.0,
    negative: Entry | None = None,
) -> Tensor:
    """The latent [B, C, ...] that a KSampler makes of this noise, as a VAE takes it. The model must be on its device.

    `text_BLD` and `extras` are a conditioning entry; `guidance_B` gives each sample a guidance of its own. `cfg` beyond 1 needs the
    `negative` entry, of one prompt for all samples or of one for each.
    """
    sigmas_T = sigmas_T.to(model.device)
    x = model.noisy(noise.to(model.device, torch.float32), sigmas_T)
    for step, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas_T)):
        if on_step is not None:
            on_step(step, x)
        velocity = model.velocity(x, sigma.expand(len(x)), text_BLD, extras, guidance_B)
        if negative is not None and cfg != 1:
            velocity = guided(velocity, model.velocity(x, sigma.expand(len(x)), *for_batch(negative, len(x)), guidance_B), cfg)
        x = euler_step(x, velocity, sigma, sigma_next)
    return model.decodable(x, sigmas_T)
