"""Small random diffusion models of several kinds, built by ComfyUI from a configuration, for tests of what must hold for every model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch
from distilled_t5.families.flux import FLUX
from torch import Tensor

TOKENS, OWN_TOKENS = 16, 9


@dataclass(frozen=True)
class SmallModel:
    """A ComfyUI model class with its configuration, the shape of a latent without its batch, text channels, noise level, and extras."""

    kind: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    text_width: int
    sigma: float
    masked: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)

    def patcher(self) -> Any:
        """The model with random weights, always the same, in ComfyUI's patcher, on the CPU."""
        config = getattr(comfy.supported_models, self.kind)(dict(self.config))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "")
        randomize(model.diffusion_model)
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    def inputs(self, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """A noisy latent, its noise level [B], text [B, L, D], and the other parts of a conditioning entry."""
        generator = torch.Generator().manual_seed(5)
        latent = torch.randn(batch, *self.latent, generator=generator) * max(self.sigma, 1.0)
        text_BLD = torch.randn(batch, TOKENS, self.text_width, generator=generator)
        mask = {"attention_mask": (torch.arange(TOKENS) < OWN_TOKENS).long().expand(batch, -1)} if self.masked else {}
        return latent, torch.full((batch,), self.sigma), text_BLD, {**self.extras, **mask}


def randomize(model: torch.nn.Module) -> None:
    """Give every weight a random value, always the same, that keeps activations near 1."""
    generator = torch.Generator().manual_seed(1)
    # Tables of positions are in files too, and not set before.
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in model.state_dict()]
    for name, weight in [*model.named_parameters(), *buffers]:
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            values *= math.prod(weight.shape[1:]) ** -0.5
        else:
            values = 0.02 * values if name.endswith("bias") else 1 + 0.1 * values
        with torch.no_grad():
            weight.copy_(values)


# fmt: off
_MOCHI = {
    "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64, "hidden_size_y": 32,
    "mlp_ratio_x": 192.0, "mlp_ratio_y": 192.0, "learn_sigma": False, "in_channels": 12, "qk_norm": True, "qkv_bias": False,
    "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True, "posenc_preserve_area": True, "timestep_mlp_bias": True,
    "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 64, "t5_token_length": TOKENS,
    "rope_theta": 10000.0,
}
_COSMOS = {
    "image_model": "cosmos", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "block_config": "FA-CA-MLP", "concat_padding_mask": True,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop", "block_x_format": "THWBD",
    "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 32, "num_blocks": 2, "num_heads": 2,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable", "rope_h_extrapolation_ratio": 1.0,
    "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 2.0,
}
_LTXV = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 4, "cross_attention_dim": 128, "num_attention_heads": 32,
    "caption_channels": 64, "in_channels": 128,
}
_Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 64, "n_layers": 2, "qk_norm": True,
    "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}
# fmt: on
SMALL_MODELS: dict[str, SmallModel] = {
    "flux": SmallModel(
        *FLUX.small, (16, 8, 8), FLUX.text_width, 0.7, extras={"pooled_output": torch.ones(1, sum(FLUX.companions.values()))}
    ),
    # Text travels in 2-D modulations.
    "mochi": SmallModel("GenmoMochi", _MOCHI, (12, 2, 8, 8), 64, 0.7, masked=True),
    # Text travels in 5-D residual streams, and noise levels go beyond 1.
    "cosmos": SmallModel("CosmosT2V", _COSMOS, (16, 2, 8, 8), 1024, 5.0, masked=True),
    # A functional RMS norm whose input is overwritten.
    "ltxv": SmallModel("LTXV", _LTXV, (128, 2, 4, 4), 64, 0.7, masked=True, extras={"frame_rate": 25}),
    # A fused norm and rotary embedding that have no backward.
    "z_image": SmallModel("ZImage", _Z_IMAGE, (16, 8, 8), 64, 0.7),
}
# The attributes of each diffusion model that hold its blocks.
BLOCK_LISTS = {
    "flux": FLUX.block_lists,
    "mochi": ("blocks",),
    "cosmos": ("blocks",),
    "ltxv": ("transformer_blocks",),
    "z_image": ("layers", "noise_refiner", "context_refiner"),
}
