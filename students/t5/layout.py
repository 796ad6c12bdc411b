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

from ...runtime.errors import StudentFileError, listed, printable
from ..kind import Shape

# Fixed in ComfyUI's T5 and in every T5 ever published.
RELATIVE_POSITION_BUCKETS = 32
T5_VOCABULARY = 32128
END, PAD = 1, 0

SHARED = "encoder.shared.weight"
FINAL_NORM = "encoder.encoder.final_layer_norm.weight"
POSITION_BIAS = "encoder.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
PROJECTION = "final_projection."
PROJECTION_IN, PROJECTION_OUT = f"{PROJECTION}0", f"{PROJECTION}3"

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
        return shapes | self._projection()

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

    def _projection(self) -> dict[str, Shape]:
        if self.hidden_width is None or self.projected_width is None:
            return {}
        shapes: dict[str, Shape] = {
            f"{PROJECTION_IN}.weight": (self.hidden_width, self.d_model),
            f"{PROJECTION_OUT}.weight": (self.projected_width, self.hidden_width),
        }
        if self.hidden_bias:
            shapes[f"{PROJECTION_IN}.bias"] = (self.hidden_width,)
        if self.output_bias:
            shapes[f"{PROJECTION_OUT}.bias"] = (self.projected_width,)
        return shapes


def read_layout(shapes: Mapping[str, Shape], where: str) -> StudentLayout:
    """Read the layout off tensor shapes by published name.

    `where` names the file in messages. Raises StudentFileError that lists every tensor that is missing, unexpected or misshapen.
    """
    layout = _guess(shapes, where)
    # Blocks are counted, not parsed: a forged block number must not make the table of expected names huge.
    wanted = layout.tensors()
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted]
    wrong = [
        f"{name}: expected {list(shape)}, got {list(shapes[name])}" for name, shape in wanted.items() if shapes.get(name, shape) != shape
    ]
    if missing or extra or wrong:
        raise StudentFileError(
            f"{where} is not a complete distilled T5: {len(missing)} tensors missing, {len(extra)} unexpected, {len(wrong)} misshapen.",
            f"download or export the file again; it was read as {layout.size_name}, by its embedding, its first block and its projection.",
            _findings(missing, extra, wrong),
        )
    return layout


def width_in(shapes: Mapping[str, Shape]) -> int | None:
    """Rows of the projection's last matrix, else columns of the token table; None without either."""
    return next(iter(shapes.get(f"{PROJECTION_OUT}.weight", ())[:1] or shapes.get(SHARED, ())[-1:]), None)


def _findings(missing: list[str], extra: list[str], wrong: list[str]) -> str:
    parts = [("Missing:", missing), ("Not part of a distilled T5:", extra), ("Wrong shape:", wrong)]
    return "\n".join(f"{title}\n{listed(names)}" for title, names in parts if names)


def _guess(shapes: Mapping[str, Shape], where: str) -> StudentLayout:
    """The layout that the shapes of a few tensors imply; `read_layout` compares every other tensor with it."""
    first = "encoder.encoder.block.0.layer"
    gated = f"{first}.1.DenseReluDense.wi_0.weight" in shapes or f"{first}.1.DenseReluDense.wi.weight" not in shapes
    names = [SHARED, f"{first}.0.SelfAttention.q.weight", f"{first}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", POSITION_BIAS]
    if f"{PROJECTION_IN}.weight" in shapes or f"{PROJECTION_OUT}.weight" in shapes:
        names += [f"{PROJECTION_IN}.weight", f"{PROJECTION_OUT}.weight"]
    (vocab_size, d_model), (inner, _), (d_ff, _), (_, num_heads), *widths = _matrices(shapes, names, where)
    if inner % num_heads:
        raise StudentFileError(
            f"{where}: the attention width {inner} is not a multiple of its {num_heads} attention heads.",
            "download or export the file again.",
        )
    projection = {}
    if widths:
        projection = {
            "hidden_width": widths[0][0],
            "projected_width": widths[1][0],
            "hidden_bias": f"{PROJECTION_IN}.bias" in shapes,
            "output_bias": f"{PROJECTION_OUT}.bias" in shapes,
        }
    return StudentLayout(d_model, d_ff, _count_blocks(shapes), num_heads, inner // num_heads, gated, vocab_size, **projection)


def _matrices(shapes: Mapping[str, Shape], names: list[str], where: str) -> list[Shape]:
    """The shapes of tensors that must exist and be matrices."""
    missing = [name for name in names if name not in shapes]
    if missing:
        raise StudentFileError(
            f"{where} is not a complete distilled T5: {len(missing)} of the tensors that determine its sizes are missing.",
            "download or export the file again, or pick the distilled T5 file.",
            f"Missing:\n{listed(missing)}\n{_beginning(shapes)}",
        )
    for name in names:
        if len(shapes[name]) != 2 or min(shapes[name]) < 1:
            raise StudentFileError(
                f"{where}: {name}: expected a matrix, got shape {printable(str(list(shapes[name])))}.",
                "download or export the file again.",
            )
    return [shapes[name] for name in names]


def _beginning(shapes: Mapping[str, Shape]) -> str:
    return f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:8])}" if shapes else "It holds no tensors."


def _count_blocks(shapes: Mapping[str, Shape]) -> int:
    """The number of consecutive blocks from 0; blocks beyond a gap are reported as unexpected."""
    present = {name.split(".", 4)[3] for name in shapes if name.startswith("encoder.encoder.block.")}
    count = 0
    while str(count) in present:
        count += 1
    return count
