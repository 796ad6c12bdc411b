"""The large encoder as ComfyUI loads it, without the layers on which its family's text does not depend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sd

from ..families import FAMILIES
from ..families.family import Family


class WithoutLastLayers:
    """What the large encoder's text model does before ComfyUI's class where `absent` layers are missing at its end.

    A layer that is chosen by its place from the end (CLIPSetLastLayer) is that of the complete encoder.
    """

    absent: int

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        layer = options.get("layer")
        if isinstance(layer, int):
            if layer + self.absent > -1:
                raise ValueError(
                    f"Layer {layer} of the text encoder is not loaded: expected {-1 - self.absent} or less.\n"
                    "What to do: remove CLIP Set Last Layer, or load the complete file with ComfyUI's own Load CLIP."
                )
            options = {**options, "layer": layer + self.absent}
        super().set_clip_options(options)  # pyright: ignore


def load_large(
    paths: Sequence[str],
    family: Family,
    model_options: Mapping[str, Any] | None = None,
    embedding_folders: Sequence[str] = (),
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """ComfyUI's own CLIP of the large encoder and its companions. Layers that the family does not read are neither loaded nor computed."""
    options = {**(model_options or {}), **family.large_options}
    clip = comfy.sd.load_clip([*paths], [*embedding_folders] or None, comfy.sd.CLIPType[family.clip_type], options, disable_dynamic)
    if family.layers_read:
        _count_absent_layers(getattr(clip.cond_stage_model, family.part), family.teacher_layout.num_layers - family.layers_read)
        # With dynamic VRAM, ComfyUI calls this for a second, fully loaded copy of the model.
        clip.patcher.cached_patcher_init = (_load_patcher, (paths, family.name, model_options, embedding_folders))
    return clip


def _load_patcher(paths: Sequence[str], family: str, model_options: Any, folders: Sequence[str], disable_dynamic: bool = False) -> Any:
    return load_large(paths, FAMILIES[family], model_options, folders, disable_dynamic).patcher


def _count_absent_layers(part: Any, absent: int) -> None:
    usual = part.layer_idx
    part.__class__ = type(f"Trimmed{type(part).__name__}", (WithoutLastLayers, type(part)), {"absent": absent})
    if part.layer == "hidden":
        part.set_clip_options({"layer": usual})
        part.options_default = (part.layer, part.layer_idx, part.return_projected_pooled)
