"""The Qwen3 student as ComfyUI runs it."""

# B batch, N layers that the diffusion model takes, L text tokens, D text width

from __future__ import annotations

import functools
from typing import Any

import torch
from comfy.text_encoders.llama import Llama2_, Qwen3_06BConfig
from torch import Tensor
from torch.nn import Identity, Module

from ..projection import projection
from .layout import Qwen3Layout


class ProjectedQwen3(Module):
    """ComfyUI's Qwen3 followed by the projection, both made of ComfyUI's `operations`.

    usual_layer: the layer that the family takes of the large encoder, from the end, or None for the last; the student's last one, after
    its norm, stands for it, and those below it for the layers below.
    """

    usual_layer: int | None = None

    def __init__(self, layout: Qwen3Layout, dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__()
        self.num_layers, self.dtype = layout.num_layers, dtype
        self.encoder = Llama2_(qwen3_config(layout), device=device, dtype=dtype, ops=operations)
        linear = functools.partial(operations.Linear, dtype=dtype, device=device)
        self.final_projection = projection(layout, layout.hidden_size, linear, Identity())

    def get_input_embeddings(self) -> Any:
        return self.encoder.embed_tokens

    def forward(self, *args: Any, intermediate_output: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As ComfyUI's text encoders: the last layer, and the one asked for. A family that stacks N layers gets [B, N, L, D] of both."""
        kwargs["final_layer_norm_intermediate"] = True  # the projection takes normalized states, whatever the family takes
        last, lower = self.encoder(*args, intermediate_output=self._own_layer(intermediate_output), **kwargs)[:2]
        stacked = len(intermediate_output) if isinstance(intermediate_output, list) else 0
        text = self._projected(last, stacked)
        return text, text if lower is None else self._projected(lower, stacked)

    def _projected(self, hidden_BLD: Tensor, stacked: int) -> Tensor:
        text_BLD = self.final_projection(hidden_BLD)
        return text_BLD.unflatten(-1, (stacked, -1)).movedim(2, 1) if stacked else text_BLD

    def _own_layer(self, asked: Any) -> int | None:
        """The student's layer, from its end, for one of the large encoder's; None for its last."""
        if not isinstance(asked, int):
            return None
        own = asked - (-1 if self.usual_layer is None else self.usual_layer) - 1
        return own if own < -1 else None


def qwen3_config(layout: Qwen3Layout) -> Qwen3_06BConfig:
    """The layout as ComfyUI's configuration of Qwen3."""
    return Qwen3_06BConfig(
        vocab_size=layout.vocab_size,
        hidden_size=layout.hidden_size,
        intermediate_size=layout.intermediate_size,
        num_hidden_layers=layout.num_layers,
        num_attention_heads=layout.num_heads,
        num_key_value_heads=layout.num_kv_heads,
    )
