"""The sizes of a distilled T5, read off the shapes of its tensors: no config file, no size menu.

The tensor names are those of the published file (LifuWang/DistillT5): transformers' T5EncoderModel under `encoder.`, then a two-layer
projection `final_projection` (Linear, ReLU, Dropout, Linear) to the text width of the diffusion model.
"""

# D d_model, F d_ff, H heads, K d_kv, V vocabulary, P hidden width of the projection, O output width

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..kind import Shape
from ..projection import PROJECTION_OUT, projection_matrices, projection_tensors, read_projection
from ..shapes import checked, count_blocks, heads_of, matrices

# Fixed in ComfyUI's T5 and in every T5 ever published.
RELATIVE_POSITION_BUCKETS = 32
T5_VOCABULARY = 32128
END, PAD = 1, 0

SHARED = "encoder.shared.weight"
FINAL_NORM = "encoder.encoder.final_layer_norm.weight"
POSITION_BIAS = "encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

# d_model, d_ff, layers, heads of T5 v1.1 and flan-T5; d_kv is 64 in all (google-research/t5x, t5 1.1 gin files).
NAMED_SIZES: dict[str, tuple[int, int, int, int]] = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}


@dataclass(frozen=True)
class StudentLayout:
    """Every size of a T5 encoder and of its projection. `hidden_width` is None when there is no projection."""

    kind: ClassVar[str] = "t5"

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    d_kv: int = 64
    gated: bool = True
    vocab_size: int = T5_VOCABULARY
    hidden_width: int | None = None
    projected_width: int | None = None
    hidden_bias: bool = False
    output_bias: bool = False

    @classmethod
    def named(cls, size: str, output_width: int | None = 4096) -> StudentLayout:
        """The layout of `small`, `base`, `large`, `xl` or `xxl`; the projection is the published one, or absent if None."""
        if size not in NAMED_SIZES:
            raise ValueError(f"unknown T5 size {size!r}: expected one of {', '.join(NAMED_SIZES)}")
        d_model, d_ff, layers, heads = NAMED_SIZES[size]
        return cls(d_model, d_ff, layers, heads, hidden_width=output_width, projected_width=output_width)

    @property
    def output_width(self) -> int:
        """Width of the embedding that reaches the diffusion model."""
        return self.projected_width or self.d_model

    @property
    def has_projection(self) -> bool:
        return self.hidden_width is not None

    @property
    def size_name(self) -> str:
        """`T5-Base` and so on; other sizes by width and depth."""
        for name, sizes in NAMED_SIZES.items():
            if sizes == (self.d_model, self.d_ff, self.num_layers, self.num_heads) and self.gated:
                return f"T5-{name.upper() if name.startswith('x') else name.capitalize()}"
        return f"T5 of width {self.d_model}, {self.num_layers} layers"

    @property
    def parameters(self) -> int:
        """How many numbers the file holds, projection included."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def tensors(self) -> dict[str, Shape]:
        """Every tensor of a file of this layout, by its published name, with its shape."""
        shapes: dict[str, Shape] = {SHARED: (self.vocab_size, self.d_model)}
        for block in range(self.num_layers):
            shapes |= self._block(f"encoder.encoder.block.{block}.layer")
        shapes[POSITION_BIAS] = (RELATIVE_POSITION_BUCKETS, self.num_heads)
        shapes[FINAL_NORM] = (self.d_model,)
        return shapes | projection_tensors(self, self.d_model)

    def _block(self, layer: str) -> dict[str, Shape]:
        inner = self.num_heads * self.d_kv
        shapes: dict[str, Shape] = {f"{layer}.0.SelfAttention.{name}.weight": (inner, self.d_model) for name in "qkv"}
        shapes[f"{layer}.0.SelfAttention.o.weight"] = (self.d_model, inner)
        shapes[f"{layer}.0.layer_norm.weight"] = (self.d_model,)
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            shapes[f"{layer}.1.DenseReluDense.{name}.weight"] = (self.d_ff, self.d_model)
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (self.d_model, self.d_ff)
        shapes[f"{layer}.1.layer_norm.weight"] = (self.d_model,)
        return shapes


def read_layout(shapes: Mapping[str, Shape], where: str) -> StudentLayout:
    """Read the layout off tensor shapes by published name.

    `where` names the file in messages. Raises StudentFileError that lists every tensor that is missing, unexpected or misshapen.
    """
    return checked(_guess(shapes, where), shapes, where, "T5")


def width_in(shapes: Mapping[str, Shape]) -> int | None:
    """Rows of the projection's last matrix, else columns of the token table; None without either."""
    return next(iter(shapes.get(f"{PROJECTION_OUT}.weight", ())[:1] or shapes.get(SHARED, ())[-1:]), None)


def _guess(shapes: Mapping[str, Shape], where: str) -> StudentLayout:
    """The layout that the shapes of a few tensors imply; `read_layout` compares every other tensor with it."""
    first = "encoder.encoder.block.0.layer"
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes or f"{first}.1.DenseReluDense.wi.weight" not in shapes
    names = [SHARED, f"{first}.0.SelfAttention.q.weight", f"{first}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", POSITION_BIAS]
    sizes = matrices(shapes, [*names, *projection_matrices(shapes)], where, "T5")
    (vocab_size, d_model), (inner, _), (d_ff, _), (_, num_heads), *_ = sizes
    d_kv = heads_of(inner, num_heads, where)
    blocks = count_blocks(shapes, "encoder.encoder.block.")
    return StudentLayout(d_model, d_ff, blocks, num_heads, d_kv, gated, vocab_size, **read_projection(shapes))
