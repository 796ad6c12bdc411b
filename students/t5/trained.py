"""The T5 student as it is trained: transformers' T5 encoder with the projection. Its state dict has the published names."""

# B batch, L text tokens, D text width, M d_model

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Dropout, Linear, Module
from transformers import T5Config, T5EncoderModel

from .layout import SHARED, StudentLayout
from .names import TOKEN_TABLE_TWIN
from .projection import projection

# The published student's (LifuWang/DistillT5), and T5's own.
DROPOUT = 0.1


class DistilledT5(Module):
    """T5 encoder and projection: token ids [B, L] to text embeddings [B, L, D].

    Every token is attended to, padding too, as in Flux's text encoder.
    """

    def __init__(self, layout: StudentLayout, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.layout = layout
        self.encoder = T5EncoderModel(transformers_config(layout, dropout))
        self.final_projection = projection(layout, Linear, Dropout(dropout))

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        hidden_BLM = self.encoder(input_ids=token_ids_BL, attention_mask=torch.ones_like(token_ids_BL)).last_hidden_state
        return self.final_projection(hidden_BLM)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load all tensors, by published name. RuntimeError lists missing and unexpected ones."""
        self.load_state_dict({**tensors, TOKEN_TABLE_TWIN: tensors[SHARED]}, strict=True)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by published name, as `write_student` takes them."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != TOKEN_TABLE_TWIN}


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
