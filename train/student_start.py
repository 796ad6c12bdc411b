"""Where a student starts: pretrained weights, a distilled file, or random values if the recipe says so."""

from __future__ import annotations

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
    from ..students.kind import Layout
    from ..students.trained import TrainedStudent


def make_student(layout: Layout, start: str, dropout: float, seed: int, attends_to_padding: bool = True) -> TrainedStudent:
    """A student of this layout in float32.

    `start` is "random", a distilled file (which is used completely), or a pretrained model: a Hugging Face folder, or the file itself (its
    encoder is used, the projection is random). Raises ValueError when the weights are incomplete or do not fit the layout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = KINDS[layout.kind].trained(layout, dropout, attends_to_padding)
    if start != RANDOM:
        student.load_tensors({**student.tensors(), **_start_tensors(Path(start), layout)})
    return student


def _start_tensors(path: Path, layout: Layout) -> dict[str, Tensor]:
    kind = KINDS[layout.kind]
    if not path.exists():
        raise ValueError(
            f"{path} does not exist.\n"
            f'What to do: name a Hugging Face folder of a {kind.display_name}, a .safetensors file, or "{RANDOM}" in student.start.'
        )
    if path.is_dir():
        return kind.read_pretrained(path, layout)
    try:
        student = open_student(path)
    except StudentFileError:
        # An incomplete student is not a pretrained model either, and the first message says what it lacks.
        if any(kind.projection in name for name in read_header(path)[0]):
            raise
        return kind.read_pretrained(path, layout)
    if student.layout != layout:
        pairs = [(name, getattr(student.layout, name), ours) for name, ours in vars(layout).items()]
        differences = [f"  {name}: expected {ours}, got {theirs}" for name, theirs, ours in pairs if theirs != ours]
        raise ValueError(
            f"{path.name} is a {student.layout.size_name} whose layout is not that of the recipe's student.\n"
            + "\n".join([*differences, "What to do: change student in the recipe, or name another file in student.start."])
        )
    return {name: tensor.float() for name, tensor in student.load().items()}
