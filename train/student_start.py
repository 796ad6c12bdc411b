"""Where a student starts: pretrained weights, a distilled file, or random values if the recipe says so."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..encoder.files import open_student
from ..runtime.errors import StudentFileError
from ..runtime.weights import read_header
from ..students import KINDS
from .recipe import RANDOM

if TYPE_CHECKING:
    from ..students.t5.layout import StudentLayout
    from ..students.t5.trained import DistilledT5


def make_student(layout: StudentLayout, start: str, dropout: float, seed: int) -> DistilledT5:
    """A student of this layout in float32.

    `start` is "random", a distilled file (which is used completely), or a pretrained model: a Hugging Face folder, or the file itself (its
    encoder is used, the projection is random). Raises ValueError when the weights are incomplete or do not fit the layout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = KINDS[layout.kind].trained(layout, dropout)
    if start != RANDOM:
        student.load_tensors({**student.tensors(), **_start_tensors(Path(start), layout)})
    return student


def _start_tensors(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(
            f'{path} does not exist.\nWhat to do: name a Hugging Face folder of a T5, a .safetensors file, or "random" in student.start.'
        )
    read_pretrained = KINDS[layout.kind].read_pretrained
    if path.is_dir():
        return read_pretrained(path, layout)
    try:
        student = open_student(path)
    except StudentFileError:
        # An incomplete distilled T5 is not a plain T5 either, and the first message says what it lacks.
        if any("final_projection." in name for name in read_header(path)[0]):
            raise
        return read_pretrained(path, layout)
    if student.layout != layout:
        pairs = [(field.name, getattr(student.layout, field.name), getattr(layout, field.name)) for field in fields(layout)]
        differences = [f"  {name}: expected {ours}, got {theirs}" for name, theirs, ours in pairs if theirs != ours]
        raise ValueError(
            f"{path.name} is a {student.layout.size_name} whose layout is not that of the recipe's student.\n"
            + "\n".join([*differences, "What to do: change student in the recipe, or name another file in student.start."])
        )
    return {name: tensor.float() for name, tensor in student.load().items()}
