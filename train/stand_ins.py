"""Small random models made on the spot, for a first run without any file: a Flux of one head, and a T5 that teaches it nothing."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..encoder.files import write_student
from ..encoder.layout import StudentLayout
from ..encoder.metadata import StudentMetadata
from .flux_layout import HEAD_WIDTH, FluxLayout, Shapes

NAME = "stand-in"
# One head, and one block of each kind.
FLUX = FluxLayout(width=HEAD_WIDTH, double=1, single=1)
TEACHER = StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, hidden_width=128, projected_width=FLUX.text_width)


def teacher_file(folder: Path) -> Path:
    """A small random encoder of Flux's text width, as a file of ours."""
    return write_student(folder / "teacher.safetensors", drawn(TEACHER.tensors(), seed=1), StudentMetadata(title="stand-in teacher"))


def flux_file(folder: Path) -> Path:
    """A small random Flux with guidance embedding, in the layout that ComfyUI detects."""
    path = folder / "flux.safetensors"
    safetensors.torch.save_file(drawn(FLUX.tensors(), seed=2), path)
    return path


def drawn(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random float32 weights that keep activations near 1: norms 1, biases 0, token tables of deviation 1, the rest 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _weight(name, shape, generator) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    deviation = 1.0 if "shared" in name else math.prod(shape[1:]) ** -0.5
    # T5 does not divide attention by the root of the head's width; it draws queries that much smaller instead.
    return torch.randn(shape, generator=generator) * (deviation / 4 if name.endswith(".q.weight") else deviation)
