"""The sizes of a distilled Qwen3, read off the shapes of its tensors: no config file, no size menu.

The tensor names are those of transformers' Qwen3Model under `encoder.`, then a two-layer projection `final_projection` (Linear, ReLU,
Dropout, Linear) to the text width of the diffusion model. Under the names of published files (`model.`) ComfyUI's own loaders would take a
student for a plain language model.
"""

# H hidden size, F feed-forward size, Q heads x head width, K key and value heads x head width, V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..kind import Shape
from ..projection import PROJECTION_OUT, projection_matrices, projection_tensors, read_projection
from ..shapes import checked, count_blocks, heads_of, matrices

# Fixed in ComfyUI's Qwen3 and in every dense Qwen3 ever published.
HEAD_WIDTH, ROPE_THETA, EPSILON = 128, 1e6, 1e-6
QWEN3_VOCABULARY = 151_936
# <|im_end|> ends a turn of the chat template; <|endoftext|> pads.
END, PAD = 151_645, 151_643

TOKEN_TABLE, FINAL_NORM = "encoder.embed_tokens.weight", "encoder.norm.weight"
LAYERS = "encoder.layers."

# hidden size, feed-forward size, layers, heads, key and value heads of the dense Qwen3 (config.json of each repository).
NAMED_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "0.6b": (1024, 3072, 28, 16, 8),
    "1.7b": (2048, 6144, 28, 16, 8),
    "4b": (2560, 9728, 36, 32, 8),
    "8b": (4096, 12288, 36, 32, 8),
}


@dataclass(frozen=True)
class Qwen3Layout:
    """Every size of a Qwen3 and of its projection. `hidden_width` is None when there is no projection."""

    kind: ClassVar[str] = "qwen3"

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int = QWEN3_VOCABULARY
    hidden_width: int | None = None
    projected_width: int | None = None
    hidden_bias: bool = False
    output_bias: bool = False

    @classmethod
    def named(cls, size: str, output_width: int | None = None) -> Qwen3Layout:
        """The layout of `0.6b`, `1.7b`, `4b` or `8b`, with a projection of this width, or without one if None."""
        if size not in NAMED_SIZES:
            raise ValueError(f"unknown Qwen3 size {size!r}: expected one of {', '.join(NAMED_SIZES)}")
        return cls(*NAMED_SIZES[size], hidden_width=output_width, projected_width=output_width)

    @property
    def output_width(self) -> int:
        """Width of the embedding that reaches the diffusion model."""
        return self.projected_width or self.hidden_size

    @property
    def has_projection(self) -> bool:
        return self.hidden_width is not None

    @property
    def size_name(self) -> str:
        """`Qwen3-0.6B` and so on; other sizes by width and depth."""
        mine = (self.hidden_size, self.intermediate_size, self.num_layers, self.num_heads, self.num_kv_heads)
        known = (f"Qwen3-{name.upper()}" for name, sizes in NAMED_SIZES.items() if sizes == mine)
        return next(known, f"Qwen3 of width {self.hidden_size}, {self.num_layers} layers")

    @property
    def parameters(self) -> int:
        """How many numbers the file holds, projection included."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of a file of this layout, by its published name, with its shape."""
        shapes: dict[str, Shape] = {TOKEN_TABLE: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes |= {f"{LAYERS}{layer}.{name}.weight": shape for name, shape in self._layer().items()}
        shapes[FINAL_NORM] = (self.hidden_size,)
        return shapes | projection_tensors(self, self.hidden_size)

    def _layer(self) -> dict[str, Shape]:
        width, inner = self.hidden_size, self.intermediate_size
        queries, keys = (heads * HEAD_WIDTH for heads in (self.num_heads, self.num_kv_heads))
        return {
            "input_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "self_attn.q_norm": (HEAD_WIDTH,),
            "self_attn.k_norm": (HEAD_WIDTH,),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }


def read_layout(shapes: Mapping[str, Shape], where: str) -> Qwen3Layout:
    """Read the layout off tensor shapes by published name.

    `where` names the file in messages. Raises StudentFileError that lists every tensor that is missing, unexpected or misshapen.
    """
    return checked(_guess(shapes, where), shapes, where, "Qwen3")


def width_in(shapes: Mapping[str, Shape]) -> int | None:
    """Rows of the projection's last matrix, else columns of the token table; None without either."""
    return next(iter(shapes.get(f"{PROJECTION_OUT}.weight", ())[:1] or shapes.get(TOKEN_TABLE, ())[-1:]), None)


def _guess(shapes: Mapping[str, Shape], where: str) -> Qwen3Layout:
    """The layout that the shapes of a few tensors imply; `read_layout` compares every other tensor with it."""
    names = [TOKEN_TABLE, *(f"{LAYERS}0.{name}.weight" for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj"))]
    sizes = matrices(shapes, [*names, *projection_matrices(shapes)], where, "Qwen3")
    (vocabulary, width), (inner, _), (queries, _), (keys, _), *_ = sizes
    heads, kv_heads = (heads_of(rows, HEAD_WIDTH, where, "channels of a head") for rows in (queries, keys))
    heads_of(heads, kv_heads, where, "key and value heads")
    return Qwen3Layout(width, inner, count_blocks(shapes, LAYERS), heads, kv_heads, vocabulary, **read_projection(shapes))
