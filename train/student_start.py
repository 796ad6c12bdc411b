"""Where a student starts: pretrained T5 weights, a distilled file, or random values if the recipe says so."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..encoder.files import open_student, read_header
from ..runtime.errors import StudentFileError
from ..students.t5.layout import StudentLayout
from ..students.t5.trained import DistilledT5
from .pretrained import read_pretrained

RANDOM = "random"


def make_student(layout: StudentLayout, start: str, dropout: float, seed: int) -> DistilledT5:
    """A student of this layout in float32.

    `start` is "random", a distilled file (all of it is taken), or a T5 v1.1 or flan-T5: a Hugging Face folder, or the file itself (its
    encoder is taken, the projection is random). Raises ValueError when the weights are not whole or do not fit the layout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = DistilledT5(layout, dropout)
    if start != RANDOM:
        student.load_tensors({**student.tensors(), **_start_tensors(Path(start), layout)})
    return student


def _start_tensors(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(
            f'{path} is not there.\nWhat to do: name a Hugging Face folder of a T5, a .safetensors file, or "random" in student.start.'
        )
    if path.is_dir():
        return read_pretrained(path, layout)
    try:
        student = open_student(path)
    except StudentFileError:
        # A distilled T5 that is not whole is no T5 either, and the first message says what it lacks.
        if any("final_projection." in name for name in read_header(path)[0]):
            raise
        return read_pretrained(path, layout)
    if student.layout != layout:
        raise ValueError(
            f"{path.name} is a {student.layout.size_name} of another layout than the recipe's student.\n"
            f"{_differences(student.layout, layout)}\nWhat to do: change student in the recipe, or name another file in student.start."
        )
    return {name: tensor.float() for name, tensor in student.load().items()}


def _differences(found: StudentLayout, wanted: StudentLayout) -> str:
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in found.__dataclass_fields__]
    return "\n".join(f"  {name}: found {theirs}, the recipe says {ours}" for name, theirs, ours in pairs if theirs != ours)
