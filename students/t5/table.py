"""A T5 in a recipe."""

from __future__ import annotations

from pydantic import Field

from ...config.parts import Count, Part


class LayoutTable(Part):
    """A T5 encoder of any size."""

    d_model: Count = Field(description="width of the encoder, channels")
    d_ff: Count = Field(description="width of the feed-forward layers, channels")
    num_layers: Count = Field(description="blocks")
    num_heads: Count = Field(description="attention heads")
    d_kv: Count = Field(description="width of one attention head, channels")
    gated: bool = Field(description="gated GELU as in T5 v1.1 (true), or ReLU as in T5 v1.0 (false)")
