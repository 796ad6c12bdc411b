"""The Qwen3 student as it is trained: transformers' Qwen3 with the projection."""

# B batch, L text tokens, D text width, H hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Linear
from transformers import Qwen3Config, Qwen3Model

from ..projection import projection
from ..trained import TrainedStudent
from .layout import EPSILON, HEAD_WIDTH, PAD, ROPE_THETA, Qwen3Layout


class DistilledQwen3(TrainedStudent):
    """Qwen3 and projection. A token attends to those before it; dropout is that of the projection alone, as Qwen3 has none."""

    def __init__(self, layout: Qwen3Layout, dropout: float = 0.0, attends_to_padding: bool = False) -> None:
        super().__init__(layout, attends_to_padding)
        self.encoder = Qwen3Model(transformers_config(layout))
        self.final_projection = projection(layout, layout.hidden_size, Linear, Dropout(dropout))

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        # Ready-made, so that transformers does not look into the numbers of the mask: a rehearsal has none.
        causal_LL = torch.ones(token_ids_BL.shape[1], token_ids_BL.shape[1], dtype=torch.bool, device=token_ids_BL.device).tril()
        own_BL = torch.ones_like(token_ids_BL, dtype=torch.bool) if self.attends_to_padding else token_ids_BL != PAD
        mask_B1LL = causal_LL[None, None] & own_BL[:, None, None]
        hidden_BLH = self.encoder(input_ids=token_ids_BL, attention_mask=mask_B1LL, use_cache=False).last_hidden_state
        return self.final_projection(hidden_BLH)


def transformers_config(layout: Qwen3Layout) -> Qwen3Config:
    """The layout as the configuration of transformers' Qwen3."""
    # Some are not in the signatures of every version.
    values: dict[str, Any] = {
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": layout.num_heads,
        "num_key_value_heads": layout.num_kv_heads,
        "head_dim": HEAD_WIDTH,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    return Qwen3Config(**values)
