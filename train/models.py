"""The models of a run: found, loaded through ComfyUI, and checked against each other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..encoder.errors import StudentFileError, printable
from ..encoder.families import FAMILIES
from ..encoder.files import CHOICES, read_header
from ..encoder.layout import StudentLayout
from ..encoder.metadata import StudentMetadata
from ..encoder.student import DistilledT5
from . import stand_ins
from .failure import is_out_of_memory
from .host import lines_of_host, model_file
from .memory import MemoryNeed, check_memory, memory_need
from .recipe import Recipe
from .student_start import RANDOM, make_student
from .teacher import Teacher, load_teacher
from .trajectory import LATENT_CHANNELS
from .velocity import FrozenFlow, held_bytes

DTYPES = {"auto": None, **CHOICES}
NO_CLIP_L = "none"
# What ComfyUI itself pads Flux prompts to: the length at which a student that saw several is served.
USUAL_LENGTH = 256
NAME_A_FLUX = "What to do: name a whole Flux file (.safetensors) of models/diffusion_models in diffusion_model.file."
# What ComfyUI's detection of models raises over files that look like one it knows, and over those that do not.
HOST_ERRORS = (RuntimeError, LookupError, AttributeError, TypeError, ValueError)
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


def open_flux(path: Path, dtype: str) -> Any:
    """The host's patcher of a Flux, weights held in `dtype` (a name of DTYPES). Raises ValueError if the file is not a whole Flux."""
    patcher = _load_patcher(path, DTYPES[dtype])
    _check_flux(path.name, patcher.model)
    return patcher


def _check_flux(name: str, model: Any) -> None:
    """Raise ValueError for whatever the host has made of the file, unless it is a Flux that takes what Flux takes."""
    # The host builds several other models of Flux's parts, some under Flux's own name but without a pooled vector.
    if model.model_config.unet_config.get("image_model") != "flux" or model.diffusion_model.params.vec_in_dim is None:
        raise ValueError(f"{name} is a {type(model).__name__}, not a Flux.\n{NAME_A_FLUX}")
    parameters = model.diffusion_model.params
    expected = FAMILIES["flux"].pooled_width
    if parameters.vec_in_dim != expected:
        raise ValueError(f"{name} takes pooled text of width {parameters.vec_in_dim}, expected CLIP-L's {expected}.\n{NAME_A_FLUX}")
    if parameters.in_channels != LATENT_CHANNELS:
        raise ValueError(
            f"{name} takes {parameters.in_channels} channels, expected the {LATENT_CHANNELS} of a latent: a Flux that also wants "
            f"a picture (Fill, Canny, Depth) has nothing to follow.\n{NAME_A_FLUX}"
        )


def _load_patcher(path: Path, dtype: torch.dtype | None) -> Any:
    """What ComfyUI makes of a diffusion model's file. A file that is damaged or of another kind is refused before or while it loads."""
    if path.suffix.lower() == ".gguf":
        raise ValueError(f"{path.name} is a GGUF file, which ComfyUI itself does not load.\n{NAME_A_FLUX}")
    try:
        read_header(path)
    except StudentFileError as error:
        raise ValueError(f"{error.problem}\n{NAME_A_FLUX}") from error
    with lines_of_host("unet missing: ") as missing:
        try:
            patcher = comfy.sd.load_diffusion_model(str(path), model_options={} if dtype is None else {"dtype": dtype})
        except HOST_ERRORS as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{path.name} is no diffusion model that ComfyUI knows.\n{printable(' '.join(str(error).split()), 400)}\n{NAME_A_FLUX}"
            ) from error
    if missing:
        raise ValueError(f"{path.name} is no whole diffusion model. ComfyUI says: {printable(missing[0])}\n{NAME_A_FLUX}")
    return patcher


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
        teacher = load_teacher(t5, clip_l)
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
