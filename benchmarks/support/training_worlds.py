"""The models of a training run at any size with random weights: their arithmetic, their files, and how the trainer loads them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...devtools.models.random_models import FLUX, clip_l_shapes
from ...runtime.random_weights import draw_weight
from ...students.t5.layout import StudentLayout
from . import measuring
from .model_sizes import ClipSizes, FluxSizes, t5_forward_flops

PATCH_PX = 16
TRAJECTORY_STEPS = 20
GUIDANCE = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
# ComfyUI detects a T5-XXL by this tensor, also with other sizes.
DETECTED_BY = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
SUBJECTS = ("a red fox", "three sailing ships", "an old sailor", "a small workshop", "a wet street", "two owls", "a lighthouse")


@dataclass(frozen=True)
class TrainingWorld:
    """Sizes of diffusion model, teacher, CLIP-L and student of a run, and of its images and prompts."""

    flux: FluxSizes
    teacher: StudentLayout
    clip: ClipSizes
    student: StudentLayout
    side_px: int
    text_tokens: int

    @property
    def image_tokens(self) -> int:
        return (self.side_px // PATCH_PX) ** 2

    def forward_flops(self) -> dict[str, int]:
        """Operations of a forward pass of one sample, by model."""
        return {
            "diffusion_model": self.flux.forward_flops(self.image_tokens, self.text_tokens),
            "teacher": t5_forward_flops(self.teacher, self.text_tokens),
            "clip_l": self.clip.forward_flops(),
            "student": t5_forward_flops(self.student, self.text_tokens),
        }

    def step_flops(self, checkpoint_blocks: bool) -> int:
        """Unavoidable operations of a step, per sample, with the teacher's text already encoded.

        The diffusion model forward for the teacher, forward for the student and backward to the text, which costs a forward pass since no
        weight has a gradient; a fourth pass for what checkpointing recomputes. The student forward, and backward to its weights.
        """
        flops = self.forward_flops()
        return (4 if checkpoint_blocks else 3) * flops["diffusion_model"] + 3 * flops["student"]

    def checkpointed_forwards(self) -> float:
        """Cost of a step with our checkpointing, in forward passes of the diffusion model: last products are not recomputed."""
        left_out = self.flux.last_products_flops(self.image_tokens, self.text_tokens)
        return 4 - left_out / self.forward_flops()["diffusion_model"]

    def teacher_share(self) -> float:
        """The share of teacher and CLIP-L in the operations of a step that encodes the prompts again, without checkpointing."""
        flops = self.forward_flops()
        encoding = flops["teacher"] + flops["clip_l"]
        return encoding / (encoding + self.step_flops(checkpoint_blocks=False))

    def prompts(self, count: int) -> list[str]:
        """`count` different prompts."""
        return [f"{SUBJECTS[number % len(SUBJECTS)]} in front of a yellow house, number {number}" for number in range(count)]

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the files of the frozen models into an existing folder, one tensor at a time."""
        generator = torch.Generator().manual_seed(0)

        def draw(name: str, shape: tuple[int, ...]) -> Tensor:
            return draw_weight(name, shape, generator)

        t5 = {name.removeprefix("encoder."): shape for name, shape in self.teacher.tensors().items()}
        t5 = {DETECTED_BY: (8, FLUX.text_width), **t5}
        measuring.write_streamed(folder / "flux.safetensors", self.flux.tensors(), dtype, draw)
        measuring.write_streamed(folder / "t5xxl.safetensors", t5, dtype, measuring.initial_weight(self.teacher, generator))
        clip_l = clip_l_shapes(self.clip.width, self.clip.layers)
        measuring.write_streamed(folder / "clip_l.safetensors", clip_l, torch.float16, draw)

    def load_flow(self, folder: Path, weights: str) -> Any:
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
        # ComfyUI takes CLIP-L's sizes from `model_config`, since it adds the number of positions to them.
        options = {"t5xxl_model_config": {**t5, "d_kv": layout.d_kv}, "model_config": self.clip.comfyui_config()}
        files = [str(folder / "clip_l.safetensors"), str(folder / "t5xxl.safetensors")]
        return Teacher(comfy.sd.load_clip(files, clip_type=comfy.sd.CLIPType.FLUX, model_options=options))

    def learner(self, device: torch.device, autocast: torch.dtype | None) -> Any:
        """A random student, always the same, with AdamW, in one process."""
        from ...train.distill import Learner, linear_schedule
        from ...train.optimizer import make_optimizer
        from ...train.student_start import make_student

        student = make_student(self.student, "random", 0.1, seed=0).to(device)
        optimizer = make_optimizer(student, 1e-4, (0.9, 0.999), 0.01)
        schedule = linear_schedule(1e-4, 1, 10_000)
        return Learner(student, optimizer, schedule, 1.0, autocast, device, lambda mean: mean, contextlib.nullcontext)


REAL_TEACHER, REAL_STUDENT = StudentLayout.named("xxl", output_width=None), StudentLayout.named("base")


def real_world(text_tokens: int) -> TrainingWorld:
    """Flux dev with T5-XXL, CLIP-L and T5-Base at 512 px."""
    return TrainingWorld(FluxSizes(), REAL_TEACHER, ClipSizes(), REAL_STUDENT, 512, text_tokens)


def small_world(width: int, double: int, single: int, side_px: int = 256, text_tokens: int = 64) -> TrainingWorld:
    """For a CPU: about the real ratios of image to text tokens, double to single blocks and feed-forward to width."""
    teacher = StudentLayout(d_model=384, d_ff=1024, num_layers=5, num_heads=6)
    student = StudentLayout(d_model=32, d_ff=80, num_layers=2, num_heads=1, d_kv=32, hidden_width=384, projected_width=384)
    return TrainingWorld(FluxSizes(width, double, single, 384, 64), teacher, ClipSizes(64, 2), student, side_px, text_tokens)
