"""A world for tests of the evaluation: small random models that paint coloured noise, a suite for them, and its command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch

from ...encoder.files import write_student
from ...encoder.metadata import StudentMetadata
from ...families.flux_tensors import FluxLayout
from ...miniature.files import VAE_FILE
from ...miniature.make import make_vae
from ...runtime.random_weights import drawn
from ...students.t5.layout import StudentLayout
from .prepared import run_prepared
from .trainer import BOUND_S, PACK
from .trainer import start as start_process

TEXT_WIDTH = 64
TEACHER = StudentLayout(d_model=48, d_ff=96, num_layers=2, num_heads=3, d_kv=16, hidden_width=64, projected_width=TEXT_WIDTH)
STUDENT = StudentLayout(d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16, hidden_width=32, projected_width=TEXT_WIDTH)
FLUX = FluxLayout(width=128, double=1, single=1, text_width=TEXT_WIDTH)
SUITE = """
name = "tiny"
seed = 3
students = ["{students}"]
[teacher]
t5 = "teacher.safetensors"
clip_l = "none"
[diffusion_model]
file = "flux.safetensors"
dtype = "fp32"
vae = "miniature_vae.safetensors"
[sampling]
resolution_px = 96
steps = 3
guidance = 3.5
batch = 4
[embedding]
prompts = 8
map = false
[velocity_gap]
prompts = 6
sigma_bands = 4
[latent_distance]
prompts = 6
[cost]
repeats = 2
[page]
prompts = 6
side_px = 96
[[task]]
name = "objects"
prompts = {{ kind = "miniature", category = "single_object", limit = 10 }}
metrics = ["readback"]
[[task]]
name = "words"
prompts = {{ kind = "miniature", category = "word", limit = 6 }}
metrics = ["readback"]
"""


def write_world(base: Path) -> Path:
    """Write the models below `base` as ComfyUI's base folder, and the suite beside them; returns the suite's file."""
    models = base / "models"
    for kind in ("text_encoders", "diffusion_models", "vae"):
        (models / kind).mkdir(parents=True, exist_ok=True)
    for name, layout, seed in (("teacher", TEACHER, 1), ("student", STUDENT, 2), ("other", STUDENT, 3)):
        metadata = StudentMetadata(token_length=24, pooled="zero", text_width=TEXT_WIDTH, title=name)
        write_student(models / "text_encoders" / f"{name}.safetensors", drawn(layout.tensors(), seed), metadata)
    safetensors.torch.save_file(drawn(FLUX.tensors(), 4), models / "diffusion_models" / "flux.safetensors")
    make_vae(models)
    assert (models / "vae" / VAE_FILE).is_file()
    suite = base / "tiny.toml"
    suite.write_text(SUITE.format(students="student.safetensors"), encoding="utf-8")
    return suite


def command(comfyui: Path, base: Path, out: Path, *extra: str) -> list[str]:
    """The arguments of Python that run the world's suite into `out` on the CPU."""
    ours = [str(PACK / "evaluate"), str(base / "tiny.toml"), "--out", str(out), "--comfyui", str(comfyui), *extra]
    return [*ours, "--", "--base-directory", str(base), "--cpu"]


def start(arguments: Sequence[str], folder: Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The command in a process of its own; what it prints is in `stdout`."""
    # How many threads add up decides the last bits, and torchrun gives each process one.
    return start_process(arguments, folder, launcher, OMP_NUM_THREADS="1")


def finish(arguments: Sequence[str], folder: Path, code: int = 0, launcher: Sequence[str] = ()) -> str:
    """Run the command in `folder` to its end; what it printed. The exit status must be `code`."""
    if os.name == "posix" and not launcher:
        status, said = run_prepared(arguments, folder, BOUND_S, OMP_NUM_THREADS="1")
    else:
        process = start(arguments, folder, launcher)
        said, status = process.communicate(timeout=BOUND_S)[0], process.returncode
    assert status == code, said
    return said
