"""Diffusion model files: loaded through ComfyUI, whole or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import torch

from ..encoder.files import CHOICES, read_header
from ..families import FAMILIES
from ..runtime.comfyui import logged_lines
from ..runtime.errors import StudentFileError, printable
from ..runtime.failure import is_out_of_memory
from ..train.trajectory import LATENT_CHANNELS

DTYPES = {"auto": None, **CHOICES}


NAME_A_FLUX = "What to do: name a whole Flux file (.safetensors) of models/diffusion_models in diffusion_model.file."


# What ComfyUI's detection of models raises over files that look like one it knows, and over those that do not.
HOST_ERRORS = (RuntimeError, LookupError, AttributeError, TypeError, ValueError)


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
    with logged_lines("unet missing: ") as missing:
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
