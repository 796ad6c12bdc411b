"""The T5 student as ComfyUI runs it."""

# B batch, L text tokens, D text width

from __future__ import annotations

import functools
from typing import Any

import torch
from comfy.text_encoders.t5 import T5
from torch import Tensor
from torch.nn import Identity

from ..projection import projection
from .layout import StudentLayout


class ProjectedT5(T5):
    """ComfyUI's T5 encoder followed by the projection, both made of ComfyUI's `operations`."""

    def __init__(self, layout: StudentLayout, dtype: torch.dtype, device: torch.device, operations: Any) -> None:
        super().__init__(t5_config(layout), dtype, device, operations)
        linear = functools.partial(operations.Linear, dtype=dtype, device=device)
        self.final_projection = projection(layout, layout.d_model, linear, Identity())

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        last_BLD, intermediate_BLD = super().forward(*args, **kwargs)
        return self.final_projection(last_BLD), None if intermediate_BLD is None else self.final_projection(intermediate_BLD)


def t5_config(layout: StudentLayout) -> dict[str, Any]:
    """The layout as the configuration of ComfyUI's T5."""
    sizes = {name: getattr(layout, name) for name in ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "vocab_size")}
    # T5 v1.0 is ungated with ReLU, v1.1 and flan gated with the tanh approximation of GELU.
    activation = "gelu_pytorch_tanh" if layout.gated else "relu"
    return {**sizes, "is_gated_act": layout.gated, "dense_act_fn": activation, "model_type": "t5"}
