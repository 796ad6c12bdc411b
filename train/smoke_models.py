"""Small random models for a first run without any model file: a Flux with one head, and a teacher of Flux's text width."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch

from ..encoder.files import write_student
from ..encoder.metadata import StudentMetadata
from ..families.flux_tensors import HEAD_WIDTH, FluxLayout
from ..runtime.random_weights import drawn
from ..students.t5.layout import StudentLayout

# One head, and one block of each kind.
FLUX = FluxLayout(width=HEAD_WIDTH, double=1, single=1)
TEACHER = StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, hidden_width=128, projected_width=FLUX.text_width)


def teacher_file(folder: Path) -> Path:
    """A small random encoder of Flux's text width, in the distilled file format."""
    return write_student(folder / "teacher.safetensors", drawn(TEACHER.tensors(), seed=1), StudentMetadata(title="stand-in teacher"))


def diffusion_model_file(folder: Path) -> Path:
    """A small random Flux with guidance embedding, in the tensor names that ComfyUI detects."""
    path = folder / "flux.safetensors"
    safetensors.torch.save_file(drawn(FLUX.tensors(), seed=2), path)
    return path
