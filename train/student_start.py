"""Where a student starts: pretrained T5 weights, a distilled file, or random values if the recipe says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..encoder.dialects import published_names, split_twin
from ..encoder.errors import StudentFileError, listed
from ..encoder.files import open_student
from ..encoder.layout import StudentLayout
from ..encoder.student import DistilledT5

RANDOM = "random"
HUB_WEIGHTS = "model.safetensors"


def make_student(layout: StudentLayout, start: str, dropout: float, seed: int) -> DistilledT5:
    """A student of this layout in float32.

    `start` is "random", a distilled file (all of it is taken), or a T5 v1.1 or flan-T5: a folder with model.safetensors, or the file itself
    (its encoder is taken, the projection is random). Raises ValueError when the weights do not fit the layout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = DistilledT5(layout, dropout)
    if start != RANDOM:
        student.load_tensors({**student.tensors(), **_start_tensors(Path(start), layout)})
    return student


def _start_tensors(path: Path, layout: StudentLayout) -> dict[str, Tensor]:
    file = path / HUB_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f'{file} is not there.\nWhat to do: name a folder with {HUB_WEIGHTS}, a .safetensors file, or start = "random".')
    try:
        student = open_student(file)
    except StudentFileError:
        return _pretrained(file, layout)
    if student.layout != layout:
        raise ValueError(
            f"{file.name} is a {student.layout.size_name} of another layout than the recipe's student.\n"
            f"{_differences(student.layout, layout)}\nWhat to do: change student in the recipe, or name another file in student.start."
        )
    return {name: tensor.float() for name, tensor in student.load().items()}


def _pretrained(file: Path, layout: StudentLayout) -> dict[str, Tensor]:
    """The encoder of a T5 file as Hugging Face publishes it; its decoder and head are left aside, nothing else is."""
    loaded = safetensors.torch.load_file(file)
    names, _ = split_twin(published_names(loaded))
    names = {name: source for name, source in names.items() if not source.startswith(("decoder.", "lm_head."))}
    wanted = {name: shape for name, shape in layout.tensors().items() if not name.startswith("final_projection.")}
    problems = _misfits(wanted, {name: tuple(loaded[source].shape) for name, source in names.items()})
    if problems:
        raise ValueError(
            f"{file.name} does not fit the recipe's student ({layout.size_name}): {len(problems)} tensors differ.\n{listed(problems)}\n"
            "What to do: name the T5 v1.1 or flan-T5 of the same size, or change student.size."
        )
    return {name: loaded[names[name]].float() for name in wanted}


def _misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing = [f"{name}: missing" for name in wanted if name not in found]
    wrong = [
        f"{name}: expected {list(wanted[name])}, found {list(found[name])}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    return missing + wrong + [f"{name}: not part of it" for name in found if name not in wanted]


def _differences(found: StudentLayout, wanted: StudentLayout) -> str:
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in found.__dataclass_fields__]
    return "\n".join(f"  {name}: found {theirs}, the recipe says {ours}" for name, theirs, ours in pairs if theirs != ours)
