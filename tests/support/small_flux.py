"""A small random Flux in a file of the published tensor names, and a small random teacher for it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.families.flux_tensors import HEAD_WIDTH, FluxLayout
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.students.t5 import stand_in

# One head, and one block of each kind.
FLUX = FluxLayout(width=HEAD_WIDTH, double=1, single=1)
TEACHER = stand_in(FLUX.text_width)


def teacher_file(folder: Path) -> Path:
    """A small random encoder of Flux's text width, in the distilled file format."""
    return write_student(folder / "teacher.safetensors", drawn(TEACHER.tensors(), seed=1), StudentMetadata(title="stand-in teacher"))


def diffusion_model_file(folder: Path) -> Path:
    """A small random Flux with guidance embedding, in the tensor names that ComfyUI detects."""
    path = folder / "flux.safetensors"
    safetensors.torch.save_file(drawn(FLUX.tensors(), seed=2), path)
    return path
