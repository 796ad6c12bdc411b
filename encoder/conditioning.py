"""A prompt as conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

NOT_FINITE = (
    "load the encoder with Distilled Text Encoder Loader, in fp32 or bf16, without LoRAs. If this CLIP comes from Load Checkpoint: it "
    "takes the distilled T5 of a checkpoint for a T5-XXL without weights; put the checkpoint into models/text_encoders and pick it as the "
    "distilled encoder file (clip_name2) of Distilled Text Encoder Loader, or use a T5-XXL."
)


def encoded(clip: Any, tokens: Mapping[str, Any], **extras: Any) -> list[Any]:
    """The conditioning of a tokenized prompt. Raises ValueError if an embedding or a pooled vector holds NaN or infinity."""
    conditioning = clip.encode_from_tokens_scheduled(tokens, add_dict=extras)
    for embedding, added in conditioning:
        vectors = {"text embedding": embedding, "pooled vector": added.get("pooled_output")}
        for name, vector in vectors.items():
            if vector is not None and not torch.isfinite(vector).all():
                share = 1 - float(torch.isfinite(vector).float().mean())
                raise ValueError(
                    f"The {name} of this prompt holds NaN or infinity ({share:.0%} of its numbers): the image would be black or noise.\n"
                    f"What to do: {NOT_FINITE}"
                )
    return conditioning
