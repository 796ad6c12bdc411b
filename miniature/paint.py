"""Pictures of the miniature by the host's own sampler: what the stock KSampler draws for each caption alone, many at once."""

# B pictures, C H W latent, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import comfy.utils
import numpy as np
import torch
from torch import Tensor

from ..encoder.served import ServingOptions, load_encoder
from .folders import FLUX_FILE, SHIPPED, VAE_FILE, place
from .world import SIDE

LATENT_SHAPE = (1, 16, SIDE, SIDE)
SAMPLER, SCHEDULER, CFG = "euler", "simple", 1.0
# Captions to text [B, L, D] and pooled vectors [B, P].
Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sampling:
    """Denoising steps, guidance, and how many pictures go through the Flux at once."""

    steps: int = 20
    guidance: float = 3.5
    batch: int = 64


class Painter:
    """The miniature's Flux and VAE, loaded as the stock nodes load them."""

    def __init__(self, folder: Path = SHIPPED, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self.model = comfy.sd.load_diffusion_model(str(place(folder, FLUX_FILE)))
        self.vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(place(folder, VAE_FILE)), safe_load=True))

    @torch.no_grad()
    def paint(self, encode: Encode, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        """Pictures [B, H, W, 3] from 0 to 1. Each is a function of encoder, caption and seed: its noise does not depend on its company."""
        parts = []
        for start in range(0, len(captions), self.sampling.batch):
            some = slice(start, start + self.sampling.batch)
            text_BLD, pooled_BP = encode(captions[some])
            conditioning = [[text_BLD, {"pooled_output": pooled_BP, "guidance": self.sampling.guidance}]]
            parts.append(self._paint_batch(conditioning, seeds[some]))
        return np.concatenate(parts)

    def _paint_batch(self, conditioning: list[Any], seeds: Sequence[int]) -> np.ndarray:
        empty = torch.zeros(LATENT_SHAPE)
        noise_BCHW = torch.cat([comfy.sample.prepare_noise(empty, seed) for seed in seeds])
        latent_BCHW = comfy.sample.sample(
            self.model,
            noise_BCHW,
            self.sampling.steps,
            CFG,
            SAMPLER,
            SCHEDULER,
            conditioning,
            conditioning,
            torch.zeros_like(noise_BCHW),
            disable_pbar=True,
        )
        return self.vae.decode(latent_BCHW).float().cpu().numpy()


def served(path: Path, dtype: torch.dtype = torch.float32) -> Encode:
    """An encoder file as Distilled T5 Loader serves it, without CLIP-L; each caption is encoded by itself, as CLIP Text Encode does it."""
    clip = load_encoder(str(path), None, ServingOptions(dtype=dtype)).clip

    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = [clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0] for caption in captions]
        return torch.cat([text_1LD for text_1LD, _ in found]), torch.cat([extras["pooled_output"] for _, extras in found])

    return encode
