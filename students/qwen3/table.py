"""A Qwen3 in a recipe."""

from __future__ import annotations

from pydantic import Field

from ...config.parts import Count, Part


class LayoutTable(Part):
    """A Qwen3 of any size; its attention heads are 128 channels wide."""

    hidden_size: Count = Field(description="width of the network, channels")
    intermediate_size: Count = Field(description="width of the feed-forward layers, channels")
    num_layers: Count = Field(description="blocks")
    num_heads: Count = Field(description="attention heads")
    num_kv_heads: Count = Field(description="heads of keys and values, a divisor of num_heads")
