"""The T5 student as it is trained: transformers' T5 encoder with the projection."""

# B batch, L text tokens, D text width, M d_model

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Dropout, Linear
from transformers import T5Config, T5EncoderModel

from ..projection import projection
from ..trained import TrainedStudent
from .layout import PAD, SHARED, StudentLayout
from .names import TOKEN_TABLE_TWIN

# The published student's (LifuWang/DistillT5), and T5's own.
DROPOUT = 0.1


class DistilledT5(TrainedStudent):
    """T5 encoder and projection."""

    duplicates: ClassVar[Mapping[str, str]] = {TOKEN_TABLE_TWIN: SHARED}

    def __init__(self, layout: StudentLayout, dropout: float = DROPOUT, attends_to_padding: bool = True) -> None:
        super().__init__(layout, attends_to_padding)
        self.encoder = T5EncoderModel(transformers_config(layout, dropout))
        self.final_projection = projection(layout, layout.d_model, Linear, Dropout(dropout))

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        mask_BL = torch.ones_like(token_ids_BL) if self.attends_to_padding else (token_ids_BL != PAD).long()
        hidden_BLM = self.encoder(input_ids=token_ids_BL, attention_mask=mask_BL).last_hidden_state
        return self.final_projection(hidden_BLM)


def transformers_config(layout: StudentLayout, dropout: float = DROPOUT) -> T5Config:
    """The layout as the configuration of transformers' T5."""
    return T5Config(
        vocab_size=layout.vocab_size,
        d_model=layout.d_model,
        d_kv=layout.d_kv,
        d_ff=layout.d_ff,
        num_layers=layout.num_layers,
        num_heads=layout.num_heads,
        dropout_rate=dropout,
        feed_forward_proj="gated-gelu" if layout.gated else "relu",
    )
