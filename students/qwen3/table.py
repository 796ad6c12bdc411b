"""A Qwen3 in a recipe."""

from __future__ import annotations

from pydantic import Field, model_validator

from ...config.parts import Count, Part


class LayoutTable(Part):
    """A Qwen3 of any size; its attention heads are 128 channels wide."""

    hidden_size: Count = Field(description="width of the network, channels")
    intermediate_size: Count = Field(description="width of the feed-forward layers, channels")
    num_layers: Count = Field(description="blocks")
    num_heads: Count = Field(description="attention heads")
    num_kv_heads: Count = Field(description="heads of keys and values, a divisor of num_heads")

    @model_validator(mode="after")
    def _check_heads(self) -> LayoutTable:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"expected num_heads to be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}")
        return self
