"""Small random models made on the spot, for a first run without any file: a Flux of one head, and a T5 that teaches it nothing."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from ..encoder.files import write_student
from ..encoder.metadata import StudentMetadata
from ..families.flux_tensors import HEAD_WIDTH, FluxLayout
from ..runtime.random_weights import drawn
from ..students.t5.layout import StudentLayout

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
