"""Chroma: built from Flux's parts, without CLIP-L and without guidance."""

from __future__ import annotations

from typing import Any

from .family import Family

LATENT_CHANNELS, TEXT_WIDTH, PATCH = 16, 4096, 2


def text_classes() -> tuple[Any, Any]:
    """ComfyUI's tokenizer class of Chroma, which is PixArt's, and the factory of its text model: T5-XXL alone, prompts not padded."""
    from comfy.text_encoders.pixart_t5 import PixArtTokenizer, pixart_te

    return PixArtTokenizer, pixart_te()


def refuse(model: Any) -> str | None:
    """Why a loaded diffusion model cannot be used as a Chroma, or None."""
    found = model.model_config.unet_config.get("image_model")
    if found == "chroma_radiance":
        return "is a Chroma Radiance, which draws pixels; expected a Chroma that draws latents (Chroma1-HD, Chroma1-Base)."
    return None if found == "chroma" else f"is a {type(model).__name__}, not a Chroma."


# Two blocks of one head.
SMALL = {
    "image_model": "chroma",
    "axes_dim": [16, 56, 56],
    "num_heads": 1,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "hidden_size": 128,
    "context_in_dim": TEXT_WIDTH,
    "patch_size": PATCH,
    "vec_in_dim": None,
    "depth": 1,
    "depth_single_blocks": 1,
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
    text_classes=text_classes,
    part="t5xxl",
    tokenizer_part="clip_t5xxl",
    students=("t5",),
    teacher=("t5", "xxl"),
    text_width=TEXT_WIDTH,
    token_length=1,
    padded=False,
    block_lists=("double_blocks", "single_blocks"),
    last_layers=("linear2", "img_mlp", "txt_mlp"),
    latent_channels=LATENT_CHANNELS,
    text_width_of=lambda model: model.diffusion_model.txt_in.in_features,
    takes_guidance=lambda _model: False,
    refuse=refuse,
    sources={"Chroma1-HD.safetensors": "https://huggingface.co/lodestones/Chroma1-HD"},
    small=("Chroma", SMALL),
    published={"Chroma1-HD.safetensors": HD},
)
