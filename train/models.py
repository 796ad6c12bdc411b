"""The models of a run: found, loaded through ComfyUI, and checked against each other."""

from __future__ import annotations

import tempfile
from pathlib import Path

import comfy.model_management
import comfy.sd

from ..diffusion.files import open_flux
from ..diffusion.frozen import FrozenFlow, held_bytes
from ..encoder.metadata import StudentMetadata
from ..encoder.teacher import Teacher, load_teacher
from ..families import FAMILIES
from ..runtime.comfyui import model_file
from ..students.t5.layout import StudentLayout
from ..students.t5.trained import DistilledT5
from . import smoke_models as stand_ins
from .memory import MemoryNeed, check_memory, memory_need
from .recipe import Recipe
from .student_start import RANDOM, make_student

NO_CLIP_L = "none"
# What ComfyUI itself pads Flux prompts to: the length at which a student that saw several is served.
USUAL_LENGTH = 256
# A student may be somewhat larger than its teacher, by its projection for instance; this many times is an exchange of the two.
SMALLER_TEACHER = 2


def load_flow(recipe: Recipe) -> FrozenFlow:
    """The frozen diffusion model. Raises ValueError if the file is not a whole Flux, or not the kind of Flux that the recipe is for."""
    part = recipe.diffusion_model
    with tempfile.TemporaryDirectory() as scratch:
        path = stand_ins.flux_file(Path(scratch)) if part.file == stand_ins.NAME else model_file(part.file, "diffusion_models")
        flow = FrozenFlow(open_flux(path, part.dtype))
    _check_guidance(path.name, flow.guided, recipe.sampling.guidance)
    return flow


def _check_guidance(name: str, takes_guidance: bool, guidance: tuple[float, ...]) -> None:
    if guidance and not takes_guidance:
        raise ValueError(
            f"{name} takes no guidance (schnell), but the recipe draws it from {list(guidance)}.\n"
            "What to do: set sampling.guidance = [] for this model."
        )
    if takes_guidance and not guidance:
        raise ValueError(f"{name} needs guidance (dev), but sampling.guidance is empty.\nWhat to do: list values, such as [2.0, 3.5, 5.0].")


def load_teacher_of(recipe: Recipe, flow: FrozenFlow) -> Teacher:
    """The teacher, once it is seen that the run fits into the memory of the device.

    Raises ValueError if the teacher is no T5, gives text of another width than the diffusion model takes, or is the smaller of teacher
    and student, and if the memory is too small.
    """
    part = recipe.teacher
    clip_l = None if part.clip_l == NO_CLIP_L else model_file(part.clip_l, "text_encoders")
    with tempfile.TemporaryDirectory() as scratch:
        t5 = stand_ins.teacher_file(Path(scratch)) if part.t5 == stand_ins.NAME else model_file(part.t5, "text_encoders")
        teacher = load_teacher(t5, clip_l, FAMILIES[recipe.diffusion_model.family])
    check_memory(memory_need_of(recipe, flow, teacher), recipe, comfy.model_management.get_total_memory(flow.device), str(flow.device))
    width = teacher.encode(["a"], 2).text_BLD.shape[-1]
    if width != flow.text_width:
        raise ValueError(
            f"The teacher {part.t5} gives text of width {width}, but {recipe.diffusion_model.file} takes {flow.text_width}.\n"
            "What to do: name a teacher that was made for this diffusion model (are teacher and student exchanged?)."
        )
    if part.t5 != stand_ins.NAME:
        _check_teaches(teacher, recipe, recipe.student.student_layout(width))
    return teacher


def _check_teaches(teacher: Teacher, recipe: Recipe, layout: StudentLayout) -> None:
    weights = sum(weight.numel() for weight in teacher.text_model.parameters())
    if weights * SMALLER_TEACHER < layout.parameters:
        raise ValueError(
            f"The teacher {recipe.teacher.t5} has {weights / 1e6:,.1f} million weights, the student ({layout.size_name}) "
            f"{layout.parameters / 1e6:,.1f} million.\nWhat to do: exchange teacher.t5 and student; the larger one teaches."
        )


def memory_need_of(recipe: Recipe, flow: FrozenFlow, teacher: Teacher) -> MemoryNeed:
    """What the run needs on the diffusion model's device, by part."""
    layout = recipe.student.student_layout(flow.text_width)
    return memory_need(recipe, layout, flow.size(), held_bytes(teacher.clip.cond_stage_model), flow.device.type != "cpu")


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
