"""The Qwen3 student: a small Qwen3 with a two-layer projection, in the place of Qwen3-4B or Qwen3-8B."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..kind import StudentKind
from ..projection import PROJECTION
from .layout import END, NAMED_SIZES, PAD, TOKEN_TABLE, Qwen3Layout, read_layout, width_in
from .names import LORA_KEYS, MODULE, published_names
from .relatives import refuse_relatives

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...config.parts import Part
    from ..trained import TrainedStudent


def served(layout: Qwen3Layout, dtype: Any, device: Any, operations: Any) -> Any:
    """The module that ComfyUI runs."""
    from .served import ProjectedQwen3

    return ProjectedQwen3(layout, dtype, device, operations)


def trained(layout: Qwen3Layout, dropout: float, attends_to_padding: bool = False) -> TrainedStudent:
    """The module that is trained."""
    from .trained import DistilledQwen3

    return DistilledQwen3(layout, dropout, attends_to_padding)


def read_pretrained(path: Path, layout: Qwen3Layout) -> dict[str, Tensor]:
    """The tensors of a Qwen3."""
    from .pretrained import read_pretrained

    return read_pretrained(path, layout)


def layout_table() -> type[Part]:
    """The recipe's table."""
    from .table import LayoutTable

    return LayoutTable


def planned(size: str | Part, hidden_width: int, output_width: int) -> Qwen3Layout:
    """The layout of a recipe's student."""
    encoder = Qwen3Layout.named(size) if isinstance(size, str) else Qwen3Layout(**size.model_dump())
    return replace(encoder, hidden_width=hidden_width, projected_width=output_width)


def stand_in(output_width: int) -> Qwen3Layout:
    """A Qwen3 of two layers."""
    return Qwen3Layout(32, 64, num_layers=2, num_heads=2, num_kv_heads=1, hidden_width=64, projected_width=output_width)


HUGGING_FACE = "https://huggingface.co/"
FOLDER = "config.json and all .safetensors files (with their index) of {}Qwen/{}, in a folder of this name"
SOURCES = {
    "qwen_3_4b.safetensors": f"{HUGGING_FACE}Comfy-Org/z_image_turbo, folder split_files/text_encoders",
    **{name: FOLDER.format(HUGGING_FACE, name) for name in ("Qwen3-0.6B", "Qwen3-1.7B")},
}
# One block of one head. ComfyUI's text models take a hidden layer of at least three.
SMALL = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "lm_head": False,
}

QWEN3 = StudentKind(
    name=Qwen3Layout.kind,
    display_name="Qwen3",
    signs=("encoder.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
    table=TOKEN_TABLE,
    projection=PROJECTION,
    tokens=151_669,
    end=END,
    pad=PAD,
    lora_keys=LORA_KEYS,
    small=SMALL,
    published_names=published_names,
    refuse_relatives=refuse_relatives,
    read_layout=read_layout,
    width_in=width_in,
    named=Qwen3Layout.named,
    sizes=tuple(size for size in NAMED_SIZES if size != "8b"),
    layout_table=layout_table,
    planned=planned,
    stand_in=stand_in,
    sources=SOURCES,
    module=MODULE,
    prefix="",
    served=served,
    trained=trained,
    read_pretrained=read_pretrained,
)
