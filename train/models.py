"""The models of a run: found, loaded through ComfyUI, and checked against each other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from ..encoder.metadata import StudentMetadata
from ..encoder.student import DistilledT5
from . import stand_ins
from .host import model_file
from .recipe import Recipe
from .student_start import RANDOM, make_student
from .teacher import Teacher, load_teacher
from .velocity import FrozenFlow

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8_e4m3fn": torch.float8_e4m3fn}
NO_CLIP_L = "none"
# What ComfyUI itself pads Flux prompts to: the length at which a student that saw several is served.
USUAL_LENGTH = 256


def load_flow(recipe: Recipe) -> FrozenFlow:
    """The frozen diffusion model. Raises ValueError if the file is none that predicts velocity from text."""
    part = recipe.diffusion_model
    with tempfile.TemporaryDirectory() as scratch:
        path = stand_ins.flux_file(Path(scratch)) if part.file == stand_ins.NAME else model_file(part.file, "diffusion_models")
        dtype = DTYPES[part.dtype]
        try:
            patcher = comfy.sd.load_diffusion_model(str(path), model_options={} if dtype is None else {"dtype": dtype})
        except RuntimeError as error:
            raise ValueError(
                f"{path.name} is no diffusion model that ComfyUI knows.\n{error}\n"
                "What to do: name a Flux file of models/diffusion_models in diffusion_model.file."
            ) from error
    parameters: Any = getattr(patcher.model.diffusion_model, "params", None)
    if not hasattr(parameters, "context_in_dim") or not hasattr(parameters, "guidance_embed"):
        raise ValueError(
            f"{path.name} is a {type(patcher.model).__name__}, not a Flux.\nWhat to do: name a Flux file in diffusion_model.file."
        )
    if recipe.sampling.guidance and not parameters.guidance_embed:
        raise ValueError(
            f"{path.name} takes no guidance (schnell), but the recipe draws it from {list(recipe.sampling.guidance)}.\n"
            "What to do: set sampling.guidance = [] for this model."
        )
    if parameters.guidance_embed and not recipe.sampling.guidance:
        raise ValueError(
            f"{path.name} needs guidance (dev), but sampling.guidance is empty.\nWhat to do: list values, such as [2.0, 3.5, 5.0]."
        )
    return FrozenFlow(patcher)


def load_teacher_of(recipe: Recipe, flow: FrozenFlow) -> Teacher:
    """The teacher. Raises ValueError if it is no T5, or its width is not the diffusion model's."""
    part = recipe.teacher
    clip_l = None if part.clip_l == NO_CLIP_L else model_file(part.clip_l, "text_encoders")
    with tempfile.TemporaryDirectory() as scratch:
        t5 = stand_ins.teacher_file(Path(scratch)) if part.t5 == stand_ins.NAME else model_file(part.t5, "text_encoders")
        teacher = load_teacher(t5, clip_l)
        width = teacher.encode(["a"], 2).text_BLD.shape[-1]
    if width != flow.text_width:
        raise ValueError(
            f"The teacher {part.t5} gives text of width {width}, but {recipe.diffusion_model.file} takes {flow.text_width}.\n"
            "What to do: name a teacher that was made for this diffusion model (are teacher and student exchanged?)."
        )
    return teacher


def make_student_of(recipe: Recipe, flow: FrozenFlow) -> DistilledT5:
    """The student at its start, float32, on the diffusion model's device. Raises ValueError if its first weights do not fit."""
    part = recipe.student
    start = part.start if part.start == RANDOM else str(model_file(part.start, "text_encoders"))
    student = make_student(part.student_layout(flow.text_width), start, part.dropout, recipe.seed)
    return student.to(flow.device)


def metadata_of(recipe: Recipe, steps: int) -> StudentMetadata:
    """What the file of this run's student says about itself after `steps` optimizer steps."""
    lengths = recipe.sampling.token_lengths
    return StudentMetadata(
        family=recipe.diffusion_model.family,
        token_length=USUAL_LENGTH if USUAL_LENGTH in lengths else max(lengths),
        pooled="zero" if recipe.teacher.clip_l == NO_CLIP_L else "clip_l",
        title=recipe.output.name,
        facts={
            "distilled_t5.teacher": Path(recipe.teacher.t5).name,
            "distilled_t5.diffusion_model": Path(recipe.diffusion_model.file).name,
            "distilled_t5.recipe_sha256": recipe.sha256,
            "distilled_t5.steps": str(steps),
        },
    )
