"""Pictures of the miniature by the host's own sampler: what the stock KSampler draws for each caption alone, many at once."""

# B pictures, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import comfy.sd
import torch
from torch import Tensor

from ..diffusion.vae import load_vae
from ..encoder.served import ServingOptions, load_encoder
from ..evaluate import painter
from ..evaluate.painter import Encode, Sampling
from ..runtime.model_folders import SHIPPED
from ..world.pictures import SIDE_PX
from .files import FLUX_FILE, VAE_FILE, place

__all__ = ["Encode", "Painter", "Sampling", "served"]


class Painter(painter.Painter):
    """The miniature's Flux and VAE, loaded as the stock nodes load them."""

    def __init__(self, folder: Path = SHIPPED, sampling: Sampling | None = None) -> None:
        model = comfy.sd.load_diffusion_model(str(place(folder, FLUX_FILE)))
        super().__init__(model, load_vae(place(folder, VAE_FILE)), replace(sampling or Sampling(), resolution_px=SIDE_PX))


def served(path: Path, dtype: torch.dtype = torch.float32) -> Encode:
    """An encoder file as Distilled T5 Loader serves it, without CLIP-L; each caption is encoded by itself, as CLIP Text Encode does it."""
    clip = load_encoder(str(path), None, ServingOptions(dtype=dtype)).clip

    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = [clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0] for caption in captions]
        return torch.cat([text_1LD for text_1LD, _ in found]), torch.cat([extras["pooled_output"] for _, extras in found])

    return encode
