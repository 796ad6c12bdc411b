"""Chroma: built from Flux's parts, without CLIP-L and without guidance."""

from __future__ import annotations

from typing import Any

from .family import LATENT_CHANNELS, Family
from .flux import BLOCK_LISTS, KEYS_VALUES, LAST_LAYERS, PATCH, SMALL_TRUNK


def refuse(model: Any) -> str | None:
    """Why a loaded diffusion model cannot be used as a Chroma, or None."""
    found = model.model_config.unet_config.get("image_model")
    if found == "chroma_radiance":
        return "is a Chroma Radiance, which draws pixels; expected a Chroma that draws latents (Chroma1-HD, Chroma1-Base)."
    return None if found == "chroma" else f"is a {type(model).__name__}, not a Chroma."


SMALL = SMALL_TRUNK | {
    "image_model": "chroma",
    "vec_in_dim": None,
    "in_channels": LATENT_CHANNELS * PATCH**2,
    "out_channels": LATENT_CHANNELS * PATCH**2,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 128,
    "n_layers": 1,
}
HD = {"num_heads": 24, "hidden_size": 3072, "depth": 19, "depth_single_blocks": 38, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}

CHROMA = Family(
    name="chroma",
    display_name="Chroma",
    modelspec="chroma",
    clip_type="CHROMA",
    text_model=("pixart_t5", "PixArtTokenizer", "pixart_te"),
    tokenizer_part="clip_t5xxl",
    token_length=1,
    padded=False,
    masked=True,
    network="comfy.ldm.chroma.model.Chroma",
    block_lists=BLOCK_LISTS,
    last_layers=LAST_LAYERS,
    last_blocks_without_text=1,
    text_projection=("txt_in",),
    keys_values=KEYS_VALUES,
    text_width_of=lambda model: model.diffusion_model.txt_in.in_features,
    refuse=refuse,
    sources={"Chroma1-HD.safetensors": "https://huggingface.co/lodestones/Chroma1-HD"},
    small=("Chroma", SMALL),
    published={"Chroma1-HD.safetensors": HD},
)
