"""A family unlike Flux in its text side, registered for tests alone: T5 without CLIP-L, prompts not padded, no pooled vector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.sd
from distilled_t5.families.family import Family
from distilled_t5.families.flux import FLUX

T5_ALONE: Family = replace(
    FLUX,
    name="t5_alone",
    display_name="T5 alone",
    clip_type="PIXART",
    text_model=("pixart_t5", "PixArtTokenizer", "pixart_te"),
    tokenizer_part="clip_t5xxl",
    token_length=1,
    companions={},
    least_side_px=320,
)


def stock_clip(tensors: dict[str, Any], config: dict[str, int]) -> Any:
    """ComfyUI's own CLIP of the family, of T5-XXL tensors."""
    return comfy.sd.load_text_encoder_state_dicts(
        [tensors], clip_type=comfy.sd.CLIPType.PIXART, model_options={"t5xxl_model_config": config}
    )
