"""Sizes of Flux, T5 and CLIP-L, and the operations of a forward pass of each.

Matrix products are counted, a multiplication and an addition as two operations.
"""

# W width, L layers, T text tokens, S image and text tokens together

from __future__ import annotations

from dataclasses import dataclass

from ...families.flux_tensors import PATCH_VALUES, FluxLayout
from ...students.t5.layout import StudentLayout

CLIP_TOKENS = 77


@dataclass(frozen=True)
class FluxSizes(FluxLayout):
    """A Flux and its arithmetic."""

    def forward_flops(self, image_tokens: int, text_tokens: int) -> int:
        """Operations of one forward pass of one sample."""
        width, together = self.width, image_tokens + text_tokens
        ends = image_tokens * 2 * PATCH_VALUES * width + text_tokens * self.text_width * width
        embedded = sum(inputs * width + width * width for inputs in self.embedders().values())
        modulations = (12 * self.double + 3 * self.single + 2) * width * width
        blocks = (self.double + self.single) * (12 * width * width * together + 2 * together * together * width)
        return 2 * (ends + embedded + modulations + blocks)

    def last_products_flops(self, image_tokens: int, text_tokens: int) -> int:
        """The operations of the last product of every block, which the trainer's checkpointing does not recompute."""
        return 2 * (image_tokens + text_tokens) * self.width * self.width * (4 * self.double + 5 * self.single)


@dataclass(frozen=True)
class ClipSizes:
    """A CLIP text encoder; the defaults are those of CLIP-L. Widths in channels."""

    width: int = 768
    layers: int = 12

    def comfyui_config(self) -> dict[str, int]:
        """The sizes as ComfyUI's config of CLIP-L names them."""
        sizes = {"hidden_size": self.width, "intermediate_size": 4 * self.width, "projection_dim": self.width}
        return sizes | {"num_hidden_layers": self.layers, "num_attention_heads": max(1, self.width // 64)}

    def forward_flops(self) -> int:
        """Operations of one forward pass of one prompt."""
        layer = 12 * self.width * self.width * CLIP_TOKENS + 2 * CLIP_TOKENS * CLIP_TOKENS * self.width
        return 2 * (self.layers * layer + self.width * self.width)


def t5_forward_flops(layout: StudentLayout, tokens: int) -> int:
    """Operations of one forward pass of a T5 encoder with its projection, if it has one, over one prompt of `tokens` tokens."""
    inner = layout.num_heads * layout.d_kv
    weights = 4 * layout.d_model * inner + (3 if layout.gated else 2) * layout.d_model * layout.d_ff
    layers = layout.num_layers * (weights * tokens + 2 * tokens * tokens * inner)
    hidden = layout.hidden_width or 0
    return 2 * (layers + tokens * hidden * (layout.d_model + layout.output_width))
