"""The models of a run: found, loaded through ComfyUI, and checked against each other."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import torch

from ..config.files import ConfigError
from ..diffusion.files import UnfittingModel, check_family, check_guidance, open_diffusion_model, use_one_thread_if_small
from ..diffusion.frozen import FrozenModel
from ..encoder.metadata import StudentMetadata
from ..encoder.teacher import Teacher, load_teacher
from ..runtime.comfyui import model_file
from ..runtime.errors import StudentFileError, UserError
from ..runtime.header import read_entries
from ..runtime.ranks import Ranks
from ..students.kind import Layout
from ..students.trained import TrainedStudent
from . import stand_ins
from .batches import served_length
from .file_sizes import text_width_in
from .memory import GB, Rehearsal, check_memory, check_ram, least_ram, ram_parts, shipped_advice, usable_of, without_gpu
from .objectives import OBJECTIVES
from .recipe import RANDOM, STAND_IN, Recipe
from .remedies import GENERAL, fitting, smaller, with_less_ram
from .student_start import make_student
from .unloaded import check_blocks, projection_alone

# A student may be somewhat larger than its teacher, by its projection for instance; beyond this factor the two are exchanged.
SMALLER_TEACHER = 2
# What torch and ComfyUI raise for what they cannot do with tensors that have no numbers.
CANNOT_REHEARSE = (ImportError, RuntimeError, TypeError, AttributeError, LookupError, AssertionError)
# Where memory ran out although the run fits, other programs use some: what is advised takes no more than this share.
LESS = 0.9
log = logging.getLogger(__name__)


def load_frozen_model(recipe: Recipe) -> FrozenModel:
    """The frozen diffusion model, or its text projection alone where a run needs no more.

    Raises ValueError if the file is not of the recipe's family, or the guidance or a stage's `blocks` do not fit it.
    """
    part, device = recipe.diffusion_model, comfy.model_management.get_torch_device()
    projected = any(OBJECTIVES[stage.objective].at == "projection" for stage in recipe.stages)
    if part.file == STAND_IN:
        model = stand_ins.diffusion_model(recipe.family, part.dtype)
    elif recipe.needs_diffusion_model:
        path = model_file(part.file, "diffusion_models")
        model = open_diffusion_model(path, part.dtype, recipe.family)
        if projected:
            # The file's, as in a run that only imitates: `diffusion_model.dtype` is for the loaded model.
            model.text_projection = projection_alone(path, recipe.family, device).text_projection
    else:
        model = projection_alone(model_file(part.file, "diffusion_models"), recipe.family, device)
        check_family(Path(part.file).name, model.model, recipe.family)
    if projected:
        _ = model.text_projection  # made before the run's random numbers begin: ComfyUI draws the first values of some layers
    check_blocks(recipe, model)
    check_guidance(Path(part.file).name, model, recipe.sampling.guidance)
    use_one_thread_if_small(model)
    return model


def load_teacher_of(recipe: Recipe, text_width: int | None) -> Teacher:
    """The teacher of a diffusion model that takes text of this width, None where that is not known.

    Raises ValueError if it is not of the family's kind, gives text of another width, or is smaller than the student.
    """
    part = recipe.teacher
    companions = {name: model_file(file, "text_encoders") for name, file in part.companions.items()}
    with tempfile.TemporaryDirectory() as scratch:
        stand_in = part.t5 == STAND_IN
        t5 = stand_ins.teacher_file(Path(scratch), recipe.family) if stand_in else model_file(part.t5, "text_encoders")
        teacher = load_teacher(t5, companions, recipe.family)
    width = teacher.encode(["a"], 2).text_BLD.shape[-1]
    check_width(recipe, width, width if text_width is None else text_width)
    if not stand_in:
        for one in recipe.each:
            _check_teaches(teacher, recipe, one.student_layout(width))
    return teacher


def check_width(recipe: Recipe, width: int, taken: int) -> None:
    """Raise ValueError unless the diffusion model takes text of the width that the teacher gives."""
    if width != taken:
        raise ValueError(
            f"The teacher {recipe.teacher.t5} gives text of width {width}, but {recipe.diffusion_model.file} takes {taken}.\n"
            "What to do: name a teacher that was made for this diffusion model (are teacher and student exchanged?)."
        )


def _check_teaches(teacher: Teacher, recipe: Recipe, layout: Layout) -> None:
    weights = sum(weight.numel() for weight in teacher.text_model.parameters())
    if weights * SMALLER_TEACHER < layout.parameters:
        raise ValueError(
            f"The teacher {recipe.teacher.t5} has {weights / 1e6:,.1f} million weights, the student ({layout.size_name}) "
            f"{layout.parameters / 1e6:,.1f} million.\nWhat to do: exchange teacher.t5 and student; the larger one teaches."
        )


def rehearse_before_loading(recipe: Recipe, ranks: Ranks) -> Rehearsal | None:
    """What the run will take, compared with the memory of the device, and with the RAM beside a GPU; None where it cannot be rehearsed.

    The main process rehearses, and says what training without a GPU means.

    Raises ValueError if the run cannot fit, after rehearsing with which changes it would. A file that cannot be read so far is left to its
    own check, which says why.
    """
    device, here = comfy.model_management.get_torch_device(), ranks.on_this_machine()
    rehearsal = ranks.gather(_rehearsed(recipe, device, ranks.world) if ranks.is_main else None)[0]
    if rehearsal is None:
        return None
    if ranks.is_main and not rehearsal.on_gpu and (slow := without_gpu(rehearsal, recipe.family)):
        log.warning(slow)
    total, ram = (comfy.model_management.get_total_memory(each) for each in (device, torch.device("cpu")))
    # Without GPUs, the processes on a machine share its RAM.
    shared = not rehearsal.on_gpu and here > 1
    available, name = (total // here, f"{device} (each of {here} processes)") if shared else (total, str(device))
    again = functools.partial(rehearsal_of, device=device, processes=ranks.world)
    short = ranks.gather(rehearsal.least > usable_of(available, rehearsal.on_gpu))
    if any(short):
        # One process rehearses for all.
        first = short.index(True)
        advice = ranks.gather(what_fits(recipe, rehearsal, available, again) if ranks.rank == first else "")[first]
        check_memory(rehearsal, available, name, lambda: advice)
    if rehearsal.on_gpu:
        # With more memory on the GPU than in RAM, ComfyUI loads the model there; if both models fit, it never leaves.
        stays = total > ram and total >= rehearsal.total + rehearsal.teacher

        def parts(changed: Recipe, found: Rehearsal) -> dict[str, int]:
            return ram_parts(changed, found, ranks.world, 0 if stays else found.model)

        def needed(changed: Recipe) -> int:
            return here * sum(least_ram(parts(changed, again(changed))).values())

        check_ram(parts(recipe, rehearsal), ram, here, lambda: fitting(recipe, [*with_less_ram(recipe)], needed, ram))
    return rehearsal


def what_fits(recipe: Recipe, found: Rehearsal, total_bytes: int, again: Callable[[Recipe], Rehearsal]) -> str:
    """What to do for a run with this rehearsal on a device of this memory: changes that are rehearsed now, and the shipped recipe."""
    usable, candidates = usable_of(total_bytes, found.on_gpu), [*smaller(recipe, bool(found.teacher_beside))]
    offloaded = found.total > usable
    log.warning("Rehearsing changes of the recipe that take less memory, %d times at most ...", len(candidates).bit_length())

    def needed(changed: Recipe) -> int:
        if comfy.model_management.processing_interrupted():
            raise comfy.model_management.InterruptProcessingException
        return taken(again(changed))

    def taken(rehearsal: Rehearsal) -> int:
        return rehearsal.least if offloaded else rehearsal.total

    own = taken(found)
    advice = fitting(recipe, candidates, needed, usable if own > usable else int(LESS * own))
    return f"{advice}\n{shipped_advice(recipe.family, total_bytes, found.on_gpu)}"


def less_memory(recipe: Recipe, processes: int) -> str:
    """What to do for a run of so many processes that ran out of memory on this machine's device."""
    device = comfy.model_management.get_torch_device()
    total, again = comfy.model_management.get_total_memory(device), functools.partial(rehearsal_of, device=device, processes=processes)
    try:
        return what_fits(recipe, again(recipe), total, again)
    except (ValueError, MemoryError):
        return f"{GENERAL}\n{shipped_advice(recipe.family, total, device.type != 'cpu')}"


def less_memory_for_texts(recipe: Recipe) -> str:
    """What to do for a teacher that ran out of memory while it encoded a cache on this machine's device."""
    device, sizes = comfy.model_management.text_encoder_device(), ""
    with contextlib.suppress(ValueError, MemoryError):
        need, total = rehearsal_of(recipe, device).encoding, comfy.model_management.get_total_memory(device)
        offloaded = f", {need.least / GB:.1f} GB with its weights in RAM" if device.type != "cpu" else ""
        sizes = f"The teacher takes {need.total / GB:.1f} GB while it encodes{offloaded}, as rehearsed; {device} has {total / GB:.1f} GB.\n"
    return (
        "close other programs, then run the same command again: it goes on (on a GPU with -- --reserve-vram 2, which keeps 2 GB more of "
        f"it free).\n{sizes}If that is not enough, name a smaller file of the teacher in teacher.t5, such as one in fp8, or lower the "
        "longest of sampling.token_lengths; either makes other texts."
    )


def _rehearsed(recipe: Recipe, device: torch.device, processes: int) -> Rehearsal | None:
    try:
        return rehearsal_of(recipe, device, processes=processes)
    except StudentFileError:
        return None
    except (ConfigError, UnfittingModel):
        raise
    except ValueError as error:
        log.warning("The run is not rehearsed, so its memory is not known before it starts; it goes on. %s", error)
        return None


def rehearsal_of(recipe: Recipe, device: torch.device, as_gpu: bool = False, processes: int = 1, with_time: bool = False) -> Rehearsal:
    """The rehearsal of a run on a device, which may take the place of a GPU. Raises UserError where torch and ComfyUI cannot do it."""
    try:
        from .rehearsal import Target, rehearse  # with an old torch, this fails already

        return rehearse(recipe, Target(device, as_gpu), processes, with_time)
    except CANNOT_REHEARSE as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"{recipe.name} cannot be rehearsed with torch {torch.__version__} and this ComfyUI ({reason}).",
            "measure with --estimate where the run fits, or try a newer torch. If memory runs out, add `-- --reserve-vram GB`.",
        ) from error


def make_student_of(recipe: Recipe) -> TrainedStudent:
    """The student at its start, float32, on the CPU; its output is as wide as the teacher's.

    Raises ValueError if its first weights do not fit.
    """
    part = recipe.student
    start = part.start if part.start == RANDOM else str(model_file(part.start, "text_encoders"))
    student = make_student(recipe.student_layout(teacher_width(recipe)), start, part.dropout, recipe.seed, not recipe.family.masked)
    if part.trunk == "frozen":
        student.freeze_trunk()
    return student


def teacher_width(recipe: Recipe) -> int:
    """Channels of the text that the recipe's teacher gives, by its file's header."""
    teacher = recipe.teacher.t5
    if teacher != STAND_IN:
        with contextlib.suppress(StudentFileError):  # the teacher's own check says why
            return text_width_in([read_entries(model_file(teacher, "text_encoders"))], recipe.family)
    return recipe.family.text_width


def preview_vae(recipe: Recipe) -> Path | None:
    """The VAE of the previews; None if the recipe has none. Raises ValueError if it is not found."""
    return model_file(recipe.preview.vae, "vae") if recipe.preview.vae else None


def metadata_of(recipe: Recipe, steps: int) -> StudentMetadata:
    """The metadata of this run's student file after `steps` optimizer steps."""
    return StudentMetadata(
        family=recipe.diffusion_model.family,
        token_length=served_length(recipe),
        pooled="+".join(recipe.teacher.companions) or "zero",
        also_serves=recipe.output.also_serves,
        title=recipe.output.name,
        facts={
            "distilled_t5.teacher": Path(recipe.teacher.t5).name,
            "distilled_t5.diffusion_model": Path(recipe.diffusion_model.file).name,
            "distilled_t5.recipe_sha256": recipe.sha256,
            "distilled_t5.steps": str(steps),
        },
    )
