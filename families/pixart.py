"""PixArt-alpha and PixArt-Sigma, which predict noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .family import Family

LATENT_CHANNELS = 4


def refuse_all_but(image_model: str, display_name: str) -> Callable[[Any], str | None]:
    """Why a loaded diffusion model cannot be used as one of the two, or None, as a function of the model."""

    def refuse(model: Any) -> str | None:
        found = model.model_config.unet_config.get("image_model")
        if found == image_model:
            return None
        other = {"pixart_alpha": "PixArt-alpha", "pixart_sigma": "PixArt-Sigma"}.get(str(found), type(model).__name__)
        return f"is a {other}, not a {display_name}."

    return refuse


# As Hugging Face's repositories have it, in the names of diffusers; ComfyUI converts them.
FILE = "transformer/diffusion_pytorch_model.safetensors of https://huggingface.co/PixArt-alpha/{}, saved under this name"
ALPHA_SOURCES = {
    "pixart_alpha_1024_ms.safetensors": FILE.format("PixArt-XL-2-1024-MS"),
    "vae-ft-mse-840000-ema-pruned.safetensors": "https://huggingface.co/stabilityai/sd-vae-ft-mse-original",
}
SIGMA_SOURCES = {
    "pixart_sigma_1024_ms.safetensors": FILE.format("PixArt-Sigma-XL-2-1024-MS"),
    "sdxl_vae.safetensors": "https://huggingface.co/stabilityai/sdxl-vae",
}
# One block of four heads.
SMALL = {
    "image_model": "pixart_alpha",
    "num_heads": 4,
    "patch_size": 2,
    "hidden_size": 144,
    "in_channels": LATENT_CHANNELS,
    "depth": 1,
    "model_max_length": 120,
    "micro_condition": True,
}
XL = {"num_heads": 16, "hidden_size": 1152, "depth": 28}

PIXART_ALPHA = Family(
    name="pixart_alpha",
    display_name="PixArt-alpha",
    modelspec="pixart-alpha",
    clip_type="PIXART",
    text_model=("pixart_t5", "PixArtTokenizer", "pixart_te"),
    tokenizer_part="clip_t5xxl",
    token_length=1,
    padded=False,
    masked=True,
    network="comfy.ldm.pixart.pixartms.PixArtMS",
    block_lists={"blocks": ("image",)},
    text_projection=("y_embedder.y_proj",),
    keys_values=(("cross_attn.kv_linear", 0, 2), ("cross_attn.kv_linear", 1, 2)),
    cross_attention=("cross_attn", "q_linear", "kv_linear"),
    latent_channels=LATENT_CHANNELS,
    least_side_px=272,
    text_width_of=lambda model: model.diffusion_model.y_embedder.y_proj.fc1.in_features,
    refuse=refuse_all_but("pixart_alpha", "PixArt-alpha"),
    # The text of dropped prompts in PixArt's own training; files in the names of diffusers lack it.
    unused=frozenset({"y_embedder.y_embedding"}),
    sources=ALPHA_SOURCES,
    small=("PixArtAlpha", SMALL),
    published={"pixart_alpha_1024_ms.safetensors": XL},
)
PIXART_SIGMA = replace(
    PIXART_ALPHA,
    name="pixart_sigma",
    display_name="PixArt-Sigma",
    modelspec="pixart-sigma",
    refuse=refuse_all_but("pixart_sigma", "PixArt-Sigma"),
    sources=SIGMA_SOURCES,
    small=("PixArtSigma", SMALL | {"image_model": "pixart_sigma", "model_max_length": 300, "micro_condition": False}),
    published={"pixart_sigma_1024_ms.safetensors": XL},
)
