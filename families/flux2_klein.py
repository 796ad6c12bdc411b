"""FLUX.2 klein, whose large text encoder is Qwen3: three of its layers side by side are the text."""

# T steps

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .family import Family
from .flux import BLOCK_LISTS, KEYS_VALUES, LAST_LAYERS, takes_guidance

if TYPE_CHECKING:
    from torch import Tensor

LATENT_CHANNELS, STACKED = 128, 3


def refuse_all_but(text_width: int, display_name: str) -> Callable[[Any], str | None]:
    """Why a loaded diffusion model cannot be used as one of the two, or None, as a function of the model."""

    def refuse(model: Any) -> str | None:
        if model.model_config.unet_config.get("image_model") != "flux2":
            return f"is a {type(model).__name__}, not a {display_name}."
        width = model.diffusion_model.params.context_in_dim
        if width == text_width:
            return None
        other = {klein.text_width: klein.display_name for klein in (KLEIN_4B, KLEIN_9B)}.get(width, "FLUX.2 dev")
        return f"is a {other} (it takes text of width {width}), not a {display_name}."

    return refuse


def training_sigmas(_model: Any, steps: int, height: int, width: int) -> Tensor:
    """Noise levels [T + 1] from 1 to 0, shifted by resolution and steps as ComfyUI's Flux2Scheduler does."""
    from comfy_extras.nodes_flux import get_schedule

    sigmas_T: Any = get_schedule(steps, height * width)  # a tensor, whatever it says
    return sigmas_T


# Two blocks of one head.
SMALL = {
    "image_model": "flux2",
    "axes_dim": [32, 32, 32, 32],
    "num_heads": 1,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
    "patch_size": 1,
    "hidden_size": 128,
    "context_in_dim": STACKED * 2560,
    "vec_in_dim": None,
    "depth": 1,
    "depth_single_blocks": 1,
    "guidance_embed": False,
    "yak_mlp": False,
    "txt_norm": False,
}
HUGGING_FACE = "https://huggingface.co/"
COMFY_ORG = f"{HUGGING_FACE}Comfy-Org/flux2-klein, folder split_files/"
NINE_B = f"{HUGGING_FACE}black-forest-labs/FLUX.2-klein-9B (accept its licence there first)"
VAE = {"flux2-vae.safetensors": f"{COMFY_ORG}vae"}
FILES = {size: (f"flux-2-klein-{size}.safetensors", f"flux-2-klein-base-{size}.safetensors") for size in ("4b", "9b")}
PUBLISHED = {
    "4b": {"num_heads": 24, "hidden_size": 3072, "depth": 5, "depth_single_blocks": 20},
    "9b": {"num_heads": 32, "hidden_size": 4096, "depth": 8, "depth_single_blocks": 24, "context_in_dim": STACKED * 4096},
}

KLEIN_4B = Family(
    name="flux2_klein_4b",
    display_name="FLUX.2 klein 4B",
    modelspec="flux-2-klein-4b",
    clip_type="FLUX2",
    text_model=("flux", "KleinTokenizer", "klein_te"),
    part="qwen3_4b",
    students=("qwen3",),
    teacher=("qwen3", "4b"),
    text_width=STACKED * 2560,
    stacked=STACKED,
    layers_read=27,
    token_length=512,
    masked=True,
    network="",  # attention maps read T5's tokens
    block_lists=BLOCK_LISTS,
    last_layers=LAST_LAYERS,
    last_blocks_without_text=1,
    text_projection=("txt_in",),
    keys_values=KEYS_VALUES,
    latent_channels=LATENT_CHANNELS,
    cell_px=16,
    text_width_of=lambda model: model.diffusion_model.params.context_in_dim,
    takes_guidance=takes_guidance,
    refuse=refuse_all_but(STACKED * 2560, "FLUX.2 klein 4B"),
    training_sigmas=training_sigmas,
    sources=dict.fromkeys(FILES["4b"], f"{COMFY_ORG}diffusion_models") | VAE,
    small=("Flux2", SMALL),
    published=dict.fromkeys(FILES["4b"], PUBLISHED["4b"]),
)
KLEIN_9B = replace(
    KLEIN_4B,
    name="flux2_klein_9b",
    display_name="FLUX.2 klein 9B",
    modelspec="flux-2-klein-9b",
    text_model=("flux", "KleinTokenizer8B", "klein_te"),
    text_model_options={"model_type": "qwen3_8b"},
    part="qwen3_8b",
    teacher=("qwen3", "8b"),
    text_width=STACKED * 4096,
    refuse=refuse_all_but(STACKED * 4096, "FLUX.2 klein 9B"),
    sources=dict.fromkeys(FILES["9b"], NINE_B) | VAE,
    small=("Flux2", SMALL | {"context_in_dim": STACKED * 4096}),
    published=dict.fromkeys(FILES["9b"], PUBLISHED["9b"]),
)
