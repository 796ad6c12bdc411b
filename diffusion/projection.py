"""The diffusion model's text projection: what it does with a text before its first block."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from comfy.quant_ops import QuantizedTensor
from torch import Tensor
from torch.nn import Module, Parameter, Sequential

from ..families.family import Family


def text_projection(config: Any, family: Family, tensors: Mapping[str, Tensor], device: torch.device) -> Module:
    """The layers through which a model of this configuration of ComfyUI puts the text before its first block, in float32, on the device.

    `tensors`: those of the diffusion model, by name; others than the layers' are not read. Raises ValueError if one is missing.
    """
    config = type(config)(dict(config.unet_config))
    # ComfyUI's layers for quantised files have no weights before they are loaded, and load every format.
    config.quant_config = {"mixed_ops": True}
    config.set_inference_dtype(torch.float32, torch.float32)
    inner = config.get_model({}, "", device=device).diffusion_model
    layers = []
    for name in family.text_projection:
        layer = functools.reduce(lambda module, part: getattr(module, part, None), name.split("."), inner)
        if layer is not None:
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
            missing = [*layer.load_state_dict(own, strict=False).missing_keys, *_without_weight(layer)]
            if missing:
                raise ValueError(
                    f"The diffusion model lacks {name}.{missing[0]}.\nWhat to do: name a complete file in diffusion_model.file."
                )
            layers.append(layer)
    return _dequantized(Sequential(*layers).requires_grad_(False))


def _without_weight(layer: Module) -> list[str]:
    """The weights that ComfyUI's layers for quantised files lack, which these do not report."""
    linear = ((name, part) for name, part in layer.named_modules() if hasattr(part, "in_features"))
    return [f"{name}.weight".lstrip(".") for name, part in linear if getattr(part, "weight", None) is None]


def _dequantized(module: Module) -> Module:
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, QuantizedTensor):
            layer.weight = Parameter(weight.dequantize().float(), requires_grad=False)
            layer.layout_type = None  # type: ignore[assignment] (else inputs are quantised too)
    return module
