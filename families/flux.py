"""Flux.1: dev (guided) and schnell."""

# T steps

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .family import LATENT_CHANNELS, TEXT_WIDTH, Family

if TYPE_CHECKING:
    from torch import Tensor

POOLED_WIDTH = 768
# The resolution-dependent shift: mu is linear in the number of image tokens (black-forest-labs/flux, sampling.get_schedule).
FEWEST_TOKENS, MOST_TOKENS = 256, 4096
SHIFT_AT_FEWEST, SHIFT_AT_MOST = 0.5, 1.15
PATCH = 2
BLOCK_LISTS = {"double_blocks": ("image", "text"), "single_blocks": ("text+image",)}
LAST_LAYERS = ("linear2", "img_mlp", "txt_mlp")
KEYS_VALUES = (("txt_attn.norm.key_norm", 0, 1), ("txt_attn.qkv", 2, 3))


def takes_guidance(model: Any) -> bool:
    """Whether a loaded Flux takes guidance (dev) or not (schnell)."""
    return bool(model.diffusion_model.params.guidance_embed)


def refuse(model: Any) -> str | None:
    """Why a loaded diffusion model cannot be used as a Flux.1, or None.

    ComfyUI builds several other models from Flux's parts, some under Flux's own name but without a pooled vector.
    """
    if model.model_config.unet_config.get("image_model") != "flux" or model.diffusion_model.params.vec_in_dim is None:
        return f"is a {type(model).__name__}, not a Flux."
    parameters = model.diffusion_model.params
    if parameters.vec_in_dim != POOLED_WIDTH:
        return f"takes pooled text of width {parameters.vec_in_dim}, expected CLIP-L's {POOLED_WIDTH}."
    if parameters.in_channels != LATENT_CHANNELS:
        return (
            f"takes {parameters.in_channels} channels, expected the {LATENT_CHANNELS} of a latent: a Flux that also takes an image "
            "(Fill, Canny, Depth) cannot be followed."
        )
    return None


def resolution_shift(height: int, width: int) -> float:
    """Flux's shift mu for a latent of height x width: 0.5 at 256 image tokens, 1.15 at 4096, linear between and beyond."""
    tokens = (height // PATCH) * (width // PATCH)
    return SHIFT_AT_FEWEST + (SHIFT_AT_MOST - SHIFT_AT_FEWEST) * (tokens - FEWEST_TOKENS) / (MOST_TOKENS - FEWEST_TOKENS)


def training_sigmas(model: Any, steps: int, height: int, width: int) -> Tensor:
    """Noise levels [T + 1] from 1 to 0: dev is shifted by resolution, as ComfyUI's ModelSamplingFlux does; schnell is not."""
    import comfy.samplers

    sampling = model.model_sampling
    if takes_guidance(model):
        sampling = type(sampling)(model.model_config)
        sampling.set_parameters(shift=resolution_shift(height, width))
    return comfy.samplers.calculate_sigmas(sampling, "simple", steps)


# Two blocks of one head.
SMALL_TRUNK = {
    "axes_dim": [16, 56, 56],
    "num_heads": 1,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "hidden_size": 128,
    "context_in_dim": TEXT_WIDTH,
    "patch_size": PATCH,
    "depth": 1,
    "depth_single_blocks": 1,
}
SMALL = SMALL_TRUNK | {
    "image_model": "flux",
    "out_channels": LATENT_CHANNELS,
    "in_channels": LATENT_CHANNELS,
    "vec_in_dim": POOLED_WIDTH,
    "guidance_embed": True,
    "yak_mlp": False,
    "txt_norm": False,
}
DEV = {"num_heads": 24, "hidden_size": 3072, "depth": 19, "depth_single_blocks": 38}
PUBLISHED = {"flux1-dev.safetensors": DEV, "flux1-schnell.safetensors": DEV | {"guidance_embed": False}}

HUGGING_FACE = "https://huggingface.co/"
SCHNELL = f"{HUGGING_FACE}black-forest-labs/FLUX.1-schnell"
SOURCES = {
    "flux1-dev.safetensors": f"{HUGGING_FACE}black-forest-labs/FLUX.1-dev (accept its licence there first)",
    "flux1-schnell.safetensors": SCHNELL,
    "ae.safetensors": SCHNELL,
    "clip_l.safetensors": f"{HUGGING_FACE}comfyanonymous/flux_text_encoders",
}

FLUX = Family(
    name="flux",
    display_name="Flux.1",
    modelspec="flux-1",
    clip_type="FLUX",
    text_model=("flux", "FluxTokenizer", "flux_clip"),
    token_length=256,
    companions={"clip_l": POOLED_WIDTH},
    network="comfy.ldm.flux.model.Flux",
    block_lists=BLOCK_LISTS,
    last_layers=LAST_LAYERS,
    last_blocks_without_text=1,
    text_projection=("txt_norm", "txt_in"),
    keys_values=KEYS_VALUES,
    text_width_of=lambda model: model.diffusion_model.params.context_in_dim,
    takes_guidance=takes_guidance,
    refuse=refuse,
    training_sigmas=training_sigmas,
    sources=SOURCES,
    small=("Flux", SMALL),
    published=PUBLISHED,
)
