"""The T5 student: a T5 encoder with a two-layer projection, in the layout of LifuWang/DistillT5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..kind import StudentKind
from .layout import POSITION_BIAS, SHARED, StudentLayout, read_layout
from .names import MODULE, published_names
from .relatives import refuse_relatives

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def served(layout: StudentLayout, dtype: Any, device: Any, operations: Any) -> Any:
    """The module that ComfyUI runs."""
    from .served import ProjectedT5

    return ProjectedT5(layout, dtype, device, operations)


def trained(layout: StudentLayout, dropout: float) -> Any:
    """The module that is trained."""
    from .trained import DistilledT5

    return DistilledT5(layout, dropout)


def read_pretrained(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    """The tensors of a T5 v1.1 or flan-T5."""
    from .pretrained import read_pretrained

    return read_pretrained(path, layout)


T5 = StudentKind(
    name=StudentLayout.kind,
    signs=(POSITION_BIAS.removeprefix("encoder."),),
    table=SHARED,
    tokens=32100,  # 32,000 pieces and 100 extra ids
    small={"num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 1, "d_kv": 8, "vocab_size": 8},
    published_names=published_names,
    refuse_relatives=refuse_relatives,
    read_layout=read_layout,
    named=StudentLayout.named,
    module=MODULE,
    prefix="encoder.",
    served=served,
    trained=trained,
    read_pretrained=read_pretrained,
)
