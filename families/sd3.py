"""Stable Diffusion 3 and 3.5: medium and large."""

# K rows of the companions, D text width

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .family import LATENT_CHANNELS, TEXT_WIDTH, Family

if TYPE_CHECKING:
    from torch import Tensor

COMPANIONS = {"clip_l": 768, "clip_g": 1280}
POOLED_WIDTH, CLIP_ROWS = sum(COMPANIONS.values()), 77


def rows_before(rows: Mapping[str, Tensor]) -> Tensor:
    """The rows [1, K, D] before T5's: CLIP-L's and CLIP-G's side by side, zeros for an absent one and in the other channels."""
    import torch

    count = min(found.shape[1] for found in rows.values())
    parts = [rows[name][:, :count] if name in rows else torch.zeros(1, count, width) for name, width in COMPANIONS.items()]
    device = next(iter(rows.values())).device
    return torch.nn.functional.pad(torch.cat([part.to(device) for part in parts], dim=-1), (0, TEXT_WIDTH - POOLED_WIDTH))


def refuse(model: Any) -> str | None:
    """Why a loaded diffusion model cannot be used as an SD3, or None."""
    if not hasattr(model.diffusion_model, "joint_blocks"):
        return f"is a {type(model).__name__}, not a Stable Diffusion 3."
    config = model.model_config.unet_config
    if config.get("adm_in_channels") != POOLED_WIDTH:
        return f"takes pooled text of width {config.get('adm_in_channels')}, expected {POOLED_WIDTH}, CLIP-L's and CLIP-G's."
    if config["in_channels"] != LATENT_CHANNELS:
        return f"takes {config['in_channels']} channels, expected the {LATENT_CHANNELS} of a latent: it also takes an image."
    return None


# Two blocks, the first with the second attention of SD3.5 medium; images of up to 512 pixels.
SMALL = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": POOLED_WIDTH,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT_WIDTH, "out_features": 128}},
    "num_patches": 1024,
    "pos_embed_max_size": 32,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [0],
}
MEDIUM = {
    "depth": 24,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT_WIDTH, "out_features": 1536}},
    "num_patches": 147_456,
    "pos_embed_max_size": 384,
    "x_block_self_attn_layers": list(range(13)),
}

HUGGING_FACE = "https://huggingface.co/"
SOURCES = {
    "sd3.5_medium.safetensors": f"{HUGGING_FACE}stabilityai/stable-diffusion-3.5-medium (accept its licence there first)",
    "clip_g.safetensors": f"{HUGGING_FACE}Comfy-Org/stable-diffusion-3.5-fp8, folder text_encoders",
}

SD3 = Family(
    name="sd3",
    display_name="Stable Diffusion 3",
    modelspec="stable-diffusion-3",
    clip_type="SD3",
    text_model=("sd3_clip", "SD3Tokenizer", "sd3_clip"),
    token_length=77,
    companions=COMPANIONS,
    companions_optional=True,
    rows_before=rows_before,
    most_rows_before=CLIP_ROWS,
    network="comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
    block_lists={"joint_blocks": ("text", "image")},
    last_blocks_without_text=1,
    text_projection=("context_processor", "context_embedder"),
    keys_values=(("context_block.attn.ln_k", 0, 1), ("context_block.attn.qkv", 2, 3)),
    text_width_of=lambda model: model.diffusion_model.context_embedder.in_features,
    refuse=refuse,
    sources=SOURCES,
    small=("SD3", SMALL),
    published={"sd3.5_medium.safetensors": MEDIUM},
)
