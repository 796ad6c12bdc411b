"""The Flux: ComfyUI's own module, small."""

# B batch, C H W latent, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from ..families.flux_tensors import HEAD_WIDTH, FluxLayout
from ..runtime.random_weights import drawn
from .flow import DiffusionModel


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


def predict(flux: Any, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, guidance_B: Tensor) -> Tensor:
    """The velocity [B, C, H, W]; the pooled vector is zeros."""
    pooled_BP = x_BCHW.new_zeros(len(x_BCHW), flux.params.vec_in_dim)
    return flux(x_BCHW, sigma_B, context=text_BLD, y=pooled_BP, guidance=guidance_B, transformer_options={})


def published_name(name: str) -> str:
    """A weight's name in published files."""
    return name.removesuffix(".weight") + ".scale" if name.endswith(("query_norm.weight", "key_norm.weight")) else name


# Noise levels are shifted towards noise, where layout and letters form; ComfyUI shifts Flux by 1.15.
FLUX = DiffusionModel("flux", "miniature Flux", FluxSize(), make_flux, predict, shift=1.6, published_name=published_name)
