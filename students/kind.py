"""What a kind of student network is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .t5.layout import StudentLayout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StudentKind:
    """Everything that encoder/ and train/ know about a kind of student network.

    name: its id. signs: endings of tensor names that tell it from other kinds. table: the published name of its token table.
    tokens: how many tokens its tokenizer produces. small: sizes of the network that ComfyUI builds where the student goes, and that is
    dropped at once.

    published_names: published name -> name in the file, and the name of a duplicate of the token table. refuse_relatives: raises
    StudentFileError for networks of this kind that are not students. read_layout: the layout of tensor shapes by published name.
    named: the layout of a published size, with a projection of some width or without. activation_bytes: upper bound of the bytes that the
    network keeps for the backward pass over a number of prompts of some length under bf16 autocast.

    In ComfyUI: module, the attribute of the text model, prefix, what published names have before the served module's own, and served, a
    function (layout, dtype, device, operations) that builds it. In training: trained, a function (layout, dropout) that builds it, and
    read_pretrained, the tensors of a published model of this layout. These three import ComfyUI or transformers when they are called.
    """

    name: str
    signs: tuple[str, ...]
    table: str
    tokens: int
    small: Mapping[str, int]
    published_names: Callable[[Iterable[str]], tuple[dict[str, str], str | None]]
    refuse_relatives: Callable[[Mapping[str, Shape], str, bool], None]
    read_layout: Callable[[Mapping[str, Shape], str], StudentLayout]
    named: Callable[[str, int | None], StudentLayout]
    activation_bytes: Callable[[StudentLayout, int, int], int]
    module: str
    prefix: str
    served: Callable[[Any, Any, Any, Any], Any]
    trained: Callable[[Any, float], Any]
    read_pretrained: Callable[[Path, Any], dict[str, Tensor]]
