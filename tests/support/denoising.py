"""ComfyUI's own sampler, as the reference of the denoising loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import torch
from torch import Tensor


def sampled_by_comfyui(
    patcher: Any,
    noise: Tensor,
    steps: int,
    text_BLD: Tensor,
    extras: dict[str, Any],
    on_step: Callable[[int, Tensor, Tensor, int], None] | None = None,
) -> Tensor:
    """The latent that the stock KSampler gives for the noise, with euler and simple at CFG 1."""
    entry, empty = [[text_BLD, extras]], torch.zeros_like(noise)
    return comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", entry, entry, empty, callback=on_step, disable_pbar=True, seed=0
    )
