"""The models of a training run at any size with random weights: their files, and how the trainer loads them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...benchmarks.support.encoders import Encoder
from ...benchmarks.support.random_files import draw_any, fill, lay_out
from ...devtools.models.random_models import clip_l_shapes
from ...families.flux_tensors import FluxLayout
from ...students.t5.layout import StudentLayout

SUBJECTS = ("a red fox", "three sailing ships", "an old sailor", "a small workshop", "a wet street", "two owls", "a lighthouse")


@dataclass(frozen=True)
class TrainingWorld:
    """Sizes of diffusion model, teacher, CLIP-L and student of a run, and of its images and prompts."""

    flux: FluxLayout
    teacher: StudentLayout
    clip_width: int
    clip_layers: int
    student: StudentLayout
    side_px: int
    text_tokens: int

    def prompts(self, count: int) -> list[str]:
        """`count` different prompts."""
        return [f"{SUBJECTS[number % len(SUBJECTS)]} in front of a yellow house, number {number}" for number in range(count)]

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the files of the frozen models into a folder."""
        Encoder(self.teacher, dtype).write(folder / "t5xxl.safetensors")
        clip_l = clip_l_shapes(self.clip_width, self.clip_layers)
        for name, shapes, held in (("flux", self.flux.tensors(), dtype), ("clip_l", clip_l, torch.float16)):
            fill(lay_out(folder / f"{name}.safetensors", shapes, held), draw_any())

    def load_flow(self, folder: Path, weights: str = "fp32") -> Any:
        """The frozen diffusion model as the trainer loads it; `weights` is a dtype of recipes."""
        import comfy.sd

        from ...diffusion.files import DTYPES
        from ...diffusion.frozen import FrozenModel
        from ...families import FAMILIES

        patcher = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"), model_options={"dtype": DTYPES[weights]})
        return FrozenModel(patcher, FAMILIES["flux"])

    def load_teacher(self, folder: Path) -> Any:
        """Stock T5-XXL and CLIP-L in these sizes, as teacher."""
        import comfy.sd

        from ...encoder.teacher import Teacher

        layout = self.teacher
        t5 = {"d_model": layout.d_model, "d_ff": layout.d_ff, "num_layers": layout.num_layers, "num_heads": layout.num_heads}
        clip_l = {"hidden_size": self.clip_width, "intermediate_size": 4 * self.clip_width, "projection_dim": self.clip_width}
        clip_l |= {"num_hidden_layers": self.clip_layers, "num_attention_heads": max(1, self.clip_width // 64)}
        # ComfyUI takes CLIP-L's sizes from `model_config`, since it adds the number of positions to them.
        options = {"t5xxl_model_config": {**t5, "d_kv": layout.d_kv}, "model_config": clip_l}
        files = [str(folder / "clip_l.safetensors"), str(folder / "t5xxl.safetensors")]
        return Teacher(comfy.sd.load_clip(files, clip_type=comfy.sd.CLIPType.FLUX, model_options=options))

    def learner(self, device: torch.device) -> Any:
        """A random student, always the same, with AdamW, in one process and in fp32."""
        from ...train.distill import Learner, linear_schedule
        from ...train.optimizer import make_optimizer
        from ...train.student_start import make_student

        student = make_student(self.student, "random", 0.1, seed=0).to(device)
        optimizer = make_optimizer(student, 1e-4, (0.9, 0.999), 0.01)
        schedule = linear_schedule(1e-4, 1, 10_000)
        return Learner(student, optimizer, schedule, 1.0, None, device, lambda mean: mean, contextlib.nullcontext)


def small_world(width: int, double: int, single: int, side_px: int = 256, text_tokens: int = 64) -> TrainingWorld:
    """For a CPU: about the real ratios of image to text tokens, double to single blocks and feed-forward to width."""
    teacher = StudentLayout(d_model=384, d_ff=1024, num_layers=5, num_heads=6)
    student = StudentLayout(d_model=32, d_ff=80, num_layers=2, num_heads=1, d_kv=32, hidden_width=384, projected_width=384)
    return TrainingWorld(FluxLayout(width, double, single, 384, 64), teacher, 64, 2, student, side_px, text_tokens)
