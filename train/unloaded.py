"""The models of a run without their weights: ComfyUI's and transformers' own modules, of the real sizes, to be made of fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor
from torch.nn import Module

from ..config.files import ConfigError
from ..diffusion.files import DETECTION_ERRORS, DTYPES
from ..diffusion.frozen import FrozenModel
from ..diffusion.projection import text_projection
from ..encoder.files import StudentFile
from ..encoder.metadata import StudentMetadata
from ..encoder.served import NoCompanion, opened, text_model, usual_dtype
from ..encoder.teacher import Teacher
from ..families.family import Family
from ..runtime.comfyui import model_file
from ..runtime.errors import UndistilledError
from ..runtime.header import Entry, read_entries, read_strings
from ..runtime.weights import DTYPES as FILE_DTYPES
from ..runtime.weights import load_tensors
from .objectives import OBJECTIVES
from .recipe import STAND_IN, Recipe

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# A prompt of a CLIP in tokens.
CLIP_TOKENS = 77


def diffusion_model(recipe: Recipe, device: torch.device, as_on_gpu: bool) -> FrozenModel:
    """The recipe's diffusion model: of the sizes in its file's header, or without the file of those of the family's published model.

    as_on_gpu: hold and compute it as ComfyUI does on a GPU with bf16, whatever the device is. Raises ValueError for an unknown model.
    """
    family = recipe.family
    config, stored = _config(recipe)
    choose = _formats_on_gpu if as_on_gpu else _formats_on
    config.set_inference_dtype(*choose(config, DTYPES[recipe.diffusion_model.dtype], stored, device))
    model = config.get_model({}, "", device=device)
    return FrozenModel(comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device), family)


def _config(recipe: Recipe) -> tuple[Any, torch.dtype]:
    """ComfyUI's configuration of the diffusion model, and the number format of its weights in the file."""
    family, file = recipe.family, recipe.diffusion_model.file
    if file == STAND_IN:
        name, sizes = family.small
        return getattr(comfy.supported_models, name)(dict(sizes)), torch.float32
    path = found(file, "diffusion_models")
    if path is not None:
        return config_in(read_entries(path), path.name)
    return published_config(family, file), _format_in_name(file)


def published_config(family: Family, file: str) -> Any:
    """ComfyUI's configuration of the published model in a file of this name, else of the family's first. Raises ValueError without one."""
    name, sizes = family.small
    published = family.published.get(Path(file).name) or next(iter(family.published.values()), None)
    if published is None:
        raise ValueError(
            f"{file} was not found, and the sizes of a published {family.display_name} are not known here.\n"
            "What to do: put the file into ComfyUI's models/diffusion_models, or give its path."
        )
    return getattr(comfy.supported_models, name)({**sizes, **published})


def found(name: str, folder: str) -> Path | None:
    """The path of a recipe's model file, None where it is missing."""
    try:
        return model_file(name, folder)
    except ValueError:
        return None


def _format_in_name(file: str) -> torch.dtype:
    return torch.float8_e4m3fn if "fp8" in file else torch.bfloat16


def _without_numbers(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    return {name: torch.empty(entry.shape, dtype=FILE_DTYPES.get(entry.dtype, torch.uint8)) for name, entry in entries.items()}


def _most_common_format(entries: Mapping[str, Entry]) -> torch.dtype:
    return comfy.utils.weight_dtype(_without_numbers(entries)) or torch.float16


def config_in(entries: Mapping[str, Entry], file: str) -> tuple[Any, torch.dtype]:
    """ComfyUI's configuration of a diffusion model from the header of its file, and its number format. Raises ValueError if unknown."""
    config, inner = _detected(_without_numbers(entries), file)
    # Quantised files are counted as their numbers alone, cast for each product.
    config.quant_config = None
    return config, comfy.utils.weight_dtype(inner) or torch.bfloat16


def _detected(tensors: dict[str, Tensor], file: str) -> tuple[Any, dict[str, Tensor]]:
    """ComfyUI's configuration of a diffusion model, and the tensors of its file by their names in the model. Raises ValueError."""
    config, inner = None, {}
    with contextlib.suppress(*DETECTION_ERRORS):
        prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
        inner = comfy.utils.state_dict_prefix_replace(dict(tensors), {prefix: ""}, filter_keys=True) or dict(tensors)
        config = comfy.model_detection.model_config_from_unet(inner, "")
        if config is None and (converted := comfy.model_detection.convert_diffusers_mmdit(inner, "")) is not None:
            config, inner = comfy.model_detection.model_config_from_unet(converted, ""), converted
    if config is None:
        raise ValueError(f"{file} is not a diffusion model that ComfyUI knows.\nWhat to do: name another file in diffusion_model.file.")
    return config, inner


def width_of_diffusion_model(recipe: Recipe) -> int | None:
    """Channels of the text that the recipe's diffusion model takes; None where its file is missing or cannot be read."""
    path = found(recipe.diffusion_model.file, "diffusion_models")
    if path is None:
        return None
    with contextlib.suppress(ValueError):
        return projection_alone(path, recipe.family, torch.device("cpu")).text_width
    return None


def projection_alone(path: Path, family: Family, device: torch.device) -> FrozenModel:
    """A diffusion model of which the text projection alone is read: all other weights are on torch's `meta` device.

    Raises ValueError for a file that ComfyUI does not know, and StudentFileError for one that cannot be read.
    """
    entries = read_entries(path)
    with torch.device("meta"):
        tensors = _without_numbers(entries)
        config, inner = _detected(tensors, path.name)
    file_names = {id(tensor): name for name, tensor in tensors.items()}
    own = {name: file_names.get(id(tensor)) for name, tensor in inner.items() if name.startswith(family.text_projection)}
    needed = {file_name: name for name, file_name in own.items() if file_name is not None}
    # The sign of an older format of quantised files, whose scales have other names.
    found = load_tensors(path, [*needed, *(name for name in entries if name.endswith("scaled_fp8"))])
    found, strings = comfy.utils.convert_old_quants(found, "", metadata=read_strings(path))
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    found = {needed.get(name, name.removeprefix(prefix)): tensor for name, tensor in found.items()}
    found, _ = comfy.utils.convert_old_quants(found, "", metadata=strings)
    projection = text_projection(config, family, found, device)
    config.quant_config = None
    config.set_inference_dtype(torch.float32, None)
    inner_model = config.get_model({}, "", device=torch.device("meta"))
    model = FrozenModel(comfy.model_patcher.ModelPatcher(inner_model, load_device=device, offload_device=torch.device("cpu")), family)
    model.text_projection = projection
    return model


def check_blocks(recipe: Recipe, model: FrozenModel) -> None:
    """Raise ConfigError for a stage that compares after more blocks than the diffusion model has."""
    for stage in recipe.stages:
        with_text = OBJECTIVES[stage.objective].at == "text_stream"
        most = len(model.blocks) - (recipe.family.last_blocks_without_text if with_text else 0)
        if stage.blocks > most:
            raise ConfigError(
                f"Stage {stage.name}: expected at most {most} for blocks, got {stage.blocks}: {Path(recipe.diffusion_model.file).name} has "
                f"{len(model.blocks)} blocks" + (f", and a text stream after {most} of them." if with_text else "."),
                f"set blocks to {most} or less.",
            )


def _formats_on(
    config: Any, chosen: torch.dtype | None, stored: torch.dtype, device: torch.device
) -> tuple[torch.dtype, torch.dtype | None]:
    """In which formats ComfyUI holds weights and computes (None: in the same) on this device."""
    supported = list(config.supported_inference_dtypes)
    held = chosen or comfy.model_management.unet_dtype(supported_dtypes=supported, weight_dtype=stored)
    return held, comfy.model_management.unet_manual_cast(held, device, supported)


def _formats_on_gpu(
    config: Any, chosen: torch.dtype | None, stored: torch.dtype, _device: torch.device
) -> tuple[torch.dtype, torch.dtype | None]:
    """The same on a GPU with bf16."""
    supported = list(config.supported_inference_dtypes)
    held = chosen or (stored if stored in (*FP8, torch.float16) and stored in (*FP8, *supported) else supported[0])
    return held, supported[0] if held in FP8 else None


def teacher_model(recipe: Recipe, device: torch.device) -> Module:
    """ComfyUI's text model of the recipe's teacher; without the file, that of the published network."""
    part, family = recipe.teacher, recipe.family
    path = found(part.t5, "text_encoders")
    try:
        student = _stand_in(family) if part.t5 == STAND_IN else opened(str(path), family) if path else None
    except UndistilledError:
        student = None
    if student is not None:
        held = usual_dtype(student.dtype, None)
        return text_model(student, student.metadata.token_length, held, frozenset(part.companions), device, torch.float16)
    stored = _most_common_format(read_entries(path)) if path else torch.float8_e4m3fn if "fp8" in part.t5 else torch.float16
    _, factory = family.text_classes()
    model = factory(device=device, dtype=usual_dtype(stored, None), model_options=family.large_options)
    for name, width in family.companions.items():
        if name not in part.companions:
            setattr(model, name, None if family.companions_optional else NoCompanion(width))
        else:
            # They take a prompt at a time, and all prompts are alike: the first one's rows serve the others.
            getattr(model, name).encode_token_weights = _once(getattr(model, name).encode_token_weights)
    return model


def _once(encode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    encoded: list[Any] = []

    def first(tokens: Any) -> Any:
        if not encoded:
            encoded.append(encode(tokens))
        return encoded[0]

    return first


def _stand_in(family: Family) -> StudentFile:
    metadata = StudentMetadata(family.name, family.token_length, pooled="zero")
    return StudentFile(Path(STAND_IN), family.kind.stand_in(family.text_width), metadata, torch.float32, {})


class PromptsOfLength:
    """In the place of ComfyUI's tokenizer: every prompt has this many tokens, the empty one its end alone."""

    def __init__(self, family: Family, length: int) -> None:
        large = SimpleNamespace(tokenizer=lambda prompt: {"input_ids": [family.kind.end] * (length if prompt else 1)})
        clip = SimpleNamespace(tokenize_with_weights=lambda _prompt: [[(1, 1.0)] * CLIP_TOKENS])
        vars(self).update(dict.fromkeys(family.companions, clip) | {family.tokenizer_part or family.part: large})


def teacher_of(model: Module, family: Family, length: int, device: torch.device) -> Teacher:
    """The teacher with this text model; it encodes every prompt as one of `length` tokens."""
    patcher = SimpleNamespace(load_device=device)
    clip = SimpleNamespace(cond_stage_model=model, patcher=patcher, tokenizer=PromptsOfLength(family, length), load_model=lambda: patcher)
    return Teacher(clip, family)


def weights_from_ram(model: Module) -> None:
    """Make ComfyUI's layers copy each weight when it is used, as they do with weights that are left in RAM."""
    for layer in model.modules():
        if hasattr(layer, "weight_function"):
            vars(layer).update(comfy_cast_weights=True, weight_function=[_same], bias_function=[_same])


def _same(weight: Tensor) -> Tensor:
    return weight
