"""Z-Image and Z-Image-Turbo, whose large text encoder is Qwen3-4B."""

from __future__ import annotations

from typing import Any

from .family import LATENT_CHANNELS, Family

TEXT_WIDTH = 2560


def refuse(model: Any) -> str | None:
    """Why a loaded diffusion model cannot be used as a Z-Image, or None. ComfyUI builds Lumina 2 and others of the same class."""
    config = model.model_config.unet_config
    if config.get("image_model") == "zimage_pixel":
        return "is a Z-Image that draws pixels; expected one that draws latents (z_image_turbo_bf16.safetensors)."
    if config.get("image_model") != "lumina2" or not config.get("z_image_modulation"):
        return f"is a {type(model).__name__}, not a Z-Image."
    if config.get("siglip_feat_dim"):
        return "is a Z-Image that also takes images (Omni), which cannot be followed."
    return None


# Two blocks of two heads, beside as many of each refiner.
SMALL = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": LATENT_CHANNELS,
    "dim": 256,
    "cap_feat_dim": TEXT_WIDTH,
    "n_layers": 2,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
PUBLISHED = {"dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30}
HUGGING_FACE = "https://huggingface.co/Comfy-Org/{}, folder split_files/{}"
SOURCES = {
    "z_image_turbo_bf16.safetensors": HUGGING_FACE.format("z_image_turbo", "diffusion_models"),
    "z_image_bf16.safetensors": HUGGING_FACE.format("z_image", "diffusion_models"),
}

Z_IMAGE = Family(
    name="z_image",
    display_name="Z-Image",
    modelspec="z-image",
    clip_type="LUMINA2",
    text_model=("z_image", "ZImageTokenizer", "te"),
    part="qwen3_4b",
    students=("qwen3",),
    teacher=("qwen3", "4b"),
    text_width=TEXT_WIDTH,
    layers_read=35,
    token_length=1,
    padded=False,
    masked=True,
    network="",  # it pads text and image, each to a multiple of 32 tokens, which attention maps do not follow
    # The noise refiner's blocks do not see the text.
    block_lists={"context_refiner": ("text",), "layers": ("text+image",)},
    last_blocks_without_text=1,
    text_projection=("cap_embedder",),
    # The keys before their norm, which ComfyUI fuses with what follows.
    keys_values=(("attention.qkv", 1, 3), ("attention.qkv", 2, 3)),
    text_width_of=lambda model: model.diffusion_model.cap_embedder[1].in_features,
    refuse=refuse,
    sources=SOURCES,
    small=("ZImage", SMALL),
    published=dict.fromkeys(SOURCES, PUBLISHED),
)
