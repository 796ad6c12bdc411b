"""The SD3: ComfyUI's own module, small."""

# B batch, C H W latent, L text tokens, D text width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..families.sd3 import POOLED_WIDTH, SMALL
from ..runtime.random_weights import drawn
from .autoencoder import FLUX_SHIFT, LATENT_AT_ONE
from .flow import DiffusionModel

# Modulations and the output layer are zero at first, as in DiT (arXiv:2212.09748, adaLN-Zero).
ZEROED = (".adaLN_modulation.", "final_layer.linear.")
# SD3 takes the noise level in thousandths.
TIME_SCALE = 1000
# SD3's latent format (comfy.latent_formats.SD3), which turns the latents of the VAE, made for Flux's, into wider ones.
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609


@dataclass(frozen=True)
class SD3Size:
    """Depth, which in SD3 also sets the width, 64 x depth; patches of 16 pixels along the side of the largest image."""

    depth: int = 3
    largest_side: int = 16


def make_sd3(size: SD3Size, text_width: int, seed: int) -> Module:
    """An untrained float32 SD3 with the configuration that ComfyUI detects in its file."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper, get_2d_sincos_pos_embed

    width = 64 * size.depth
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": text_width, "out_features": width}}
    config: dict[str, Any] = {**SMALL, "depth": size.depth, "context_embedder_config": embedder, "x_block_self_attn_layers": []}
    config |= {"num_patches": size.largest_side**2, "pos_embed_max_size": size.largest_side}
    sd3 = OpenAISignatureMMDITWrapper(**config, dtype=torch.float32, device=torch.device("cpu"), operations=comfy.ops.disable_weight_init)
    weights = drawn({name: tuple(tensor.shape) for name, tensor in sd3.state_dict().items()}, seed)
    weights = {name: torch.zeros_like(weight) if any(part in name for part in ZEROED) else weight for name, weight in weights.items()}
    weights["pos_embed"] = torch.from_numpy(get_2d_sincos_pos_embed(width, size.largest_side)).float()[None]
    sd3.load_state_dict(weights, strict=True)
    return sd3


def predict(sd3: Any, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, _guidance_B: Tensor) -> Tensor:
    """The velocity [B, C, H, W]; the pooled vector is zeros."""
    return sd3(x_BCHW, sigma_B * TIME_SCALE, context=text_BLD, y=x_BCHW.new_zeros(len(x_BCHW), POOLED_WIDTH))


# Latents of four times the width need four times as much noise, so the shift is larger than Flux's; ComfyUI shifts SD3 by log(3).
SD3 = DiffusionModel(
    "sd3",
    "miniature SD3",
    SD3Size(),
    make_sd3,
    predict,
    shift=2.6,
    scale=LATENT_AT_ONE * SD3_SCALE,
    offset=(FLUX_SHIFT - SD3_SHIFT) * SD3_SCALE,
    empty_share=0.05,
)
