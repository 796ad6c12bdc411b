"""Diffusion model files: loaded through ComfyUI, completely or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from ..families import FAMILIES
from ..families.family import Family
from ..runtime.comfyui import logged_lines
from ..runtime.errors import StudentFileError, printable
from ..runtime.failure import is_of_the_driver, is_out_of_memory
from ..runtime.weights import CHOICES, read_header
from ..students.foreign import ADDED_TO_A_MODEL, foreign_kind
from .frozen import FrozenModel

DTYPES = {"auto": None, **CHOICES}
# The miniature has 1.9 million weights, the smallest published model of a family some 600 million.
SMALL_WEIGHTS = 20_000_000
QUOTED = re.compile(r"'([^']+)'")
# What ComfyUI's model detection raises for files that are not diffusion models, some of which resemble one.
DETECTION_ERRORS = (RuntimeError, LookupError, AttributeError, TypeError, ValueError)


def open_diffusion_model(path: Path, dtype: str, family: Family, exact_gradients: bool = True) -> FrozenModel:
    """A diffusion model with weights held in `dtype` (a name of DTYPES). Raises ValueError if the file is not one of this family."""
    patcher = _load_patcher(path, DTYPES[dtype], family)
    check_family(path.name, patcher.model, family)
    return FrozenModel(patcher, family, exact_gradients)


class UnfittingModel(ValueError):
    """A diffusion model of another family than the recipe's, or of another guidance."""


def check_family(name: str, model: Any, family: Family) -> None:
    """Raise UnfittingModel for a model of another family, with the name of that family if it is registered."""
    reason = family.refuse(model)
    if reason is None:
        return
    for other in FAMILIES.values():
        if other.refuse(model) is None:
            raise UnfittingModel(
                f"{name} is a {other.display_name}, not a {family.display_name}.\n"
                f'What to do: name a {family.display_name} file in diffusion_model.file, or set diffusion_model.family = "{other.name}".'
            )
    raise _refused(f"{name} {reason}", family)


def use_one_thread_if_small(model: FrozenModel) -> None:
    """Make torch use one thread for a model as small as the miniature's: more threads wait for each other on a busy machine.

    (1,289 s instead of 56 s measured.)
    """
    if sum(weight.numel() for weight in model.model.parameters()) < SMALL_WEIGHTS:
        torch.set_num_threads(1)


def check_guidance(name: str, model: FrozenModel, guidance: Sequence[float]) -> None:
    """Raise UnfittingModel unless guidance values are given exactly if the model has a guidance input."""
    if guidance and not model.takes_guidance:
        raise UnfittingModel(
            f"{name} takes no guidance, but sampling.guidance is {', '.join(f'{value:g}' for value in guidance)}.\n"
            "What to do: set sampling.guidance = [] in a recipe, or leave it out of a suite."
        )
    if model.takes_guidance and not guidance:
        usual = f"{model.family.default_guidance:g}"
        raise UnfittingModel(
            f"{name} needs guidance, but sampling.guidance is empty.\n"
            f"What to do: set it to {usual}, or to a list with {usual} among other values in a recipe."
        )


def _refused(problem: str, family: Family) -> ValueError:
    return UnfittingModel(
        f"{problem}\nWhat to do: name a complete {family.display_name} file (.safetensors) of models/diffusion_models in "
        "diffusion_model.file."
    )


def _load_patcher(path: Path, dtype: torch.dtype | None, family: Family) -> Any:
    """ComfyUI's patcher of a diffusion model file. Raises ValueError for a file that is damaged, incomplete or of another kind."""
    if path.suffix.lower() == ".gguf":
        raise _refused(f"{path.name} is a GGUF file, which ComfyUI itself does not load.", family)
    try:
        kind = foreign_kind(read_header(path)[0], family.kind)
    except StudentFileError as error:
        raise _refused(error.problem, family) from error
    if kind is not None and kind.name in ADDED_TO_A_MODEL:
        raise _refused(f"{path.name} is {kind.name}, not a diffusion model.", family)
    with logged_lines("unet missing: ") as missing:
        try:
            # As ComfyUI's own training node does: with dynamic VRAM, weights are replaced while autograd needs them.
            patcher = comfy.sd.load_diffusion_model(
                str(path), model_options={} if dtype is None else {"dtype": dtype}, disable_dynamic=True
            )
        except DETECTION_ERRORS as error:
            if is_out_of_memory(error):
                raise
            told = printable(" ".join(str(error).split()), 400)
            if is_of_the_driver(error, str(path)):
                raise ValueError(f"{path.name} could not be loaded: {told}\nWhat to do: check the GPU and its driver.") from error
            raise _refused(f"{path.name} is not a diffusion model that ComfyUI knows.\n{told}", family) from error
    needed = [line for line in missing if set(QUOTED.findall(line)) - family.unused]
    if needed:
        raise _refused(f"{path.name} is not a complete diffusion model. ComfyUI reports: {printable(needed[0])}", family)
    return patcher
