"""The files behind a MODEL and a CLIP of the graph, by the names under which ComfyUI lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths

from ..encoder.companions import in_order
from ..encoder.served import ServingOptions
from ..families.family import Family
from ..runtime.errors import UserError
from ..runtime.weights import CHOICES

LOADERS = {
    "model": "connect Load Diffusion Model directly",
    "teacher": "connect Load CLIP, DualCLIPLoader, TripleCLIPLoader or Distilled Text Encoder Loader (token_length 0) directly",
}


def diffusion_file(model: Any) -> tuple[str, str | None]:
    """The file of a MODEL, and the number format chosen for its weights, as recipes name it; None for the default.

    Raises UserError for a model that other nodes have changed, or whose file is not known.
    """
    path, options, *_ = (*_loaded_from(model, "model"), {})
    dtype = options.get("dtype") if isinstance(options, dict) else None
    names = [name for name, known in CHOICES.items() if known == dtype]
    if dtype is not None and not names:
        raise UserError(f"The model is held in {dtype}, which cannot be trained with.", "set weight_dtype to default or fp8_e4m3fn.")
    return _listed(str(path), "diffusion_models"), names[0] if names else None


def text_encoder_files(clip: Any, family: Family) -> tuple[str, dict[str, str]]:
    """The files of a CLIP: the large text encoder, and its companions (CLIP-L, CLIP-G) by name.

    Raises UserError for another kind of CLIP, for one that other nodes have changed, and for one whose files are not known.
    """
    # An SD3 CLIP may be loaded without its T5.
    if getattr(clip.cond_stage_model, family.part, None) is None:
        kind = type(clip.cond_stage_model).__name__
        expected = f"one of {family.display_name} with {family.teacher_layout.size_name}"
        raise UserError(f"The teacher is a {kind}; expected {expected}.", f"{LOADERS['teacher']}.")
    at_clip = (clip.layer_idx, clip.tokenizer_options, clip.use_clip_schedule, clip.apply_hooks_to_conds)
    paths, second, options, *_ = (*_loaded_from(clip.patcher, "teacher", any(at_clip)), None, None)
    if isinstance(options, ServingOptions) and (options.dtype or options.token_length):
        raise UserError(
            "The teacher's loader changes its number format or token length; it teaches as its file has it.",
            "set dtype to auto and token_length to 0 in Distilled Text Encoder Loader.",
        )
    # ComfyUI's own loaders: a list of files. Distilled Text Encoder Loader: the student's, then those of its companions by name.
    several = isinstance(paths, list | tuple)
    *first, t5 = paths if several else (paths,)
    others = {f"file {number}": path for number, path in enumerate(first)} if several else dict(second or {})
    companions, t5 = in_order(others, t5)
    return _listed(t5, "text_encoders"), {name: _listed(path, "text_encoders") for name, path in companions.items()}


def _loaded_from(patcher: Any, name: str, changed: bool = False) -> tuple[Any, ...]:
    """What ComfyUI's loader was called with: the path or paths, then others. `changed`: other nodes changed what holds the patcher."""
    if changed or _is_patched(patcher):
        or_loader = " or by its loader (token_length)" if name == "teacher" else ""
        raise UserError(
            f"The {name} was changed by other nodes (a LoRA, a sampling or attention node){or_loader}; "
            "it is trained with as its file has it.",
            f"{LOADERS[name]}; to train with a LoRA, save the merged model to a file and load that.",
        )
    _, arguments, *_ = patcher.cached_patcher_init or (None, ())
    paths = arguments[0] if arguments else None
    known = [paths] if isinstance(paths, str) else paths
    if not known or not all(isinstance(path, str) and Path(path).is_file() for path in known):
        raise UserError(f"The file of the {name} is not known: its loader does not say it to ComfyUI.", f"{LOADERS[name]}.")
    return arguments


def _is_patched(patcher: Any) -> bool:
    # A CLIP has ComfyUI's own object patch: the format in which it computes.
    objects = set(patcher.object_patches) - {"manual_cast_dtype"}
    patches = [patcher.patches, objects, patcher.hook_patches, patcher.forced_hooks, patcher.weight_wrapper_patches, patcher.injections]
    options = {**patcher.model_options, **patcher.model_options.get("transformer_options", {}), "transformer_options": None}
    return any([*patches, *options.values(), *patcher.wrappers.values()])


def _listed(path: str, kind: str) -> str:
    """The name in ComfyUI's list that leads to this file, else its path."""
    for folder in folder_paths.get_folder_paths(kind):
        if Path(path).is_relative_to(folder):
            name = str(Path(path).relative_to(folder))
            if folder_paths.get_full_path(kind, name) == path:
                return name
    return path
