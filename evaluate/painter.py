"""Pictures by the host's own sampler: what the stock KSampler draws for each prompt and seed alone, many at once."""

# B pictures, C H W latent, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ..families import FAMILIES

SAMPLER, SCHEDULER, CFG = "euler", "simple", 1.0
# Prompts to text [B, L, D] and pooled vectors [B, P].
Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
# Told of each step: its number, and the latent [B, C, H, W] that it starts from.
OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Sampling:
    """Denoising steps, guidance (None: the model takes none), side of the pictures, and how many go through the model at once."""

    steps: int = 20
    guidance: float | None = 3.5
    batch: int = 64
    resolution_px: int = 512

    def __str__(self) -> str:
        guided = "without guidance" if self.guidance is None else f"guidance {self.guidance:g}"
        return f"{SAMPLER} {SCHEDULER}, {self.steps} steps, {guided}, {self.resolution_px} px"


class Painter:
    """A diffusion model and its VAE, loaded as the stock nodes load them."""

    def __init__(self, model: Any, vae: Any, sampling: Sampling) -> None:
        self.model = model
        self.vae = vae
        self.sampling = sampling

    def paint(self, encode: Encode, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Pictures [B, H, W, 3] from 0 to 1. Each is a function of encoder, prompt and seed: its noise does not depend on its company."""
        parts = []
        for start in range(0, len(prompts), self.sampling.batch):
            some = slice(start, start + self.sampling.batch)
            text_BLD, pooled_BP = encode(prompts[some])
            parts.append(self.paint_batch(text_BLD, pooled_BP, seeds[some]))
        return np.concatenate(parts)

    @torch.no_grad()
    def paint_batch(self, text_BLD: Tensor, pooled_BP: Tensor, seeds: Sequence[int]) -> np.ndarray:
        """Pictures [B, H, W, 3] from 0 to 1 of texts that are encoded already, all at once."""
        return self.vae.decode(self.sample(text_BLD, pooled_BP, seeds)).float().cpu().numpy()

    @torch.no_grad()
    def sample(self, text_BLD: Tensor, pooled_BP: Tensor, seeds: Sequence[int], on_step: OnStep | None = None) -> Tensor:
        """Latents [B, C, H, W] at the end of the sampling."""
        extras: dict[str, Any] = {"pooled_output": pooled_BP}
        if self.sampling.guidance is not None:
            extras["guidance"] = self.sampling.guidance
        conditioning = [[text_BLD, extras]]
        noise_BCHW = self.noise(seeds)
        told = None if on_step is None else lambda step, _denoised, x_BCHW, _total: on_step(step, x_BCHW)
        return comfy.sample.sample(
            self.model,
            noise_BCHW,
            self.sampling.steps,
            CFG,
            SAMPLER,
            SCHEDULER,
            conditioning,
            conditioning,
            torch.zeros_like(noise_BCHW),
            callback=told,
            disable_pbar=True,
        )

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The noise [B, C, H, W] that the stock KSampler starts from at each seed."""
        empty = torch.zeros(1, *FAMILIES["flux"].latent_shape(self.sampling.resolution_px))
        return torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
