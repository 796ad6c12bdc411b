"""The T5 student: a T5 encoder with a two-layer projection, in the layout of LifuWang/DistillT5."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..kind import StudentKind
from ..projection import PROJECTION
from .layout import END, NAMED_SIZES, PAD, POSITION_BIAS, SHARED, StudentLayout, read_layout, width_in
from .names import LORA_KEYS, MODULE, published_names
from .relatives import refuse_relatives

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...config.parts import Part
    from ..trained import TrainedStudent


def served(layout: StudentLayout, dtype: Any, device: Any, operations: Any) -> Any:
    """The module that ComfyUI runs."""
    from .served import ProjectedT5

    return ProjectedT5(layout, dtype, device, operations)


def trained(layout: StudentLayout, dropout: float, attends_to_padding: bool = True) -> TrainedStudent:
    """The module that is trained."""
    from .trained import DistilledT5

    return DistilledT5(layout, dropout, attends_to_padding)


def read_pretrained(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    """The tensors of a T5 v1.1 or flan-T5."""
    from .pretrained import read_pretrained

    return read_pretrained(path, layout)


def layout_table() -> type[Part]:
    """The recipe's table."""
    from .table import LayoutTable

    return LayoutTable


def planned(size: str | Part, hidden_width: int, output_width: int) -> StudentLayout:
    """The layout of a recipe's student."""
    encoder = StudentLayout.named(size, None) if isinstance(size, str) else StudentLayout(**size.model_dump())
    return replace(encoder, hidden_width=hidden_width, projected_width=output_width)


def stand_in(output_width: int) -> StudentLayout:
    """A T5 of two layers."""
    return StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, hidden_width=128, projected_width=output_width)


HUGGING_FACE = "https://huggingface.co/"
FLAN_T5 = "config.json and all .safetensors files (with their index) of {}google/{}, in a folder of this name"
SOURCES = {
    **dict.fromkeys(["t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"], f"{HUGGING_FACE}comfyanonymous/flux_text_encoders"),
    "distilled_t5_base.safetensors": f"model.safetensors of {HUGGING_FACE}LifuWang/DistillT5, saved under this name",
    **{name: FLAN_T5.format(HUGGING_FACE, name) for name in ("flan-t5-small", "flan-t5-base", "flan-t5-large", "flan-t5-xl")},
}

T5 = StudentKind(
    name=StudentLayout.kind,
    display_name="T5",
    signs=(POSITION_BIAS.removeprefix("encoder."),),
    table=SHARED,
    projection=PROJECTION,
    tokens=32100,  # 32,000 pieces and 100 extra ids
    end=END,
    pad=PAD,
    lora_keys=LORA_KEYS,
    small={"num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 1, "d_kv": 8, "vocab_size": 8},
    published_names=published_names,
    refuse_relatives=refuse_relatives,
    read_layout=read_layout,
    width_in=width_in,
    named=StudentLayout.named,
    sizes=tuple(size for size in NAMED_SIZES if size != "xxl"),
    layout_table=layout_table,
    planned=planned,
    stand_in=stand_in,
    sources=SOURCES,
    module=MODULE,
    prefix="encoder.",
    served=served,
    trained=trained,
    read_pretrained=read_pretrained,
)
