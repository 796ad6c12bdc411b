"""A LoRA for the miniature's Flux that turns each colour into the next one, so code can check whether it is applied."""

# B batch, R rank

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter, ParameterList
from torch.nn.utils import parametrize

from ..world.pictures import COLOURS, Scene
from .flux import FluxSize, load_weights, make_flux, published_name

RANK = 4
# Layers of the text and image streams; not norms, embeddings and the output.
TRAINED_PARTS = ("double_blocks.", "single_blocks.")
_NAMES = list(COLOURS)
NEXT_COLOUR = dict(zip(_NAMES, [*_NAMES[1:], _NAMES[0]], strict=True))


def repainted(scene: Scene) -> Scene:
    """The scene in the LoRA's palette: things and letters have the next colour, the background is unchanged."""
    things = tuple(replace(thing, colour=NEXT_COLOUR[thing.colour]) for thing in scene.things)
    return replace(scene, things=things, ink=NEXT_COLOUR[scene.ink] if scene.ink else "")


class LowRank(Module):
    """A weight plus the product of `up` [out, R] and `down` [R, in], which is zero at first."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.up = Parameter(torch.zeros(len(weight), rank))
        self.down = Parameter(torch.randn(rank, weight.shape[1], generator=generator) * weight.shape[1] ** -0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def with_lora(flux: Module, rank: int = RANK, seed: int = 0) -> dict[str, LowRank]:
    """Freeze a Flux and add a LoRA to each linear layer of its blocks; returns them by the names of the layers."""
    generator = torch.Generator().manual_seed(seed)
    flux.requires_grad_(False)
    layers = {name: module for name, module in flux.named_modules() if isinstance(module, Linear) and name.startswith(TRAINED_PARTS)}
    low_ranks = {name: LowRank(layer.weight, rank, generator) for name, layer in layers.items()}
    for name, low_rank in low_ranks.items():
        parametrize.register_parametrization(layers[name], "weight", low_rank)
    return low_ranks


def trained_part(low_ranks: Mapping[str, LowRank]) -> ParameterList:
    """The parameters of the LoRA as a module to train."""
    return ParameterList([weight for low_rank in low_ranks.values() for weight in (low_rank.up, low_rank.down)])


def load_flux(path: Path, text_width: int) -> Module:
    """The miniature's Flux from its file, as ComfyUI's module in float32."""
    flux = make_flux(FluxSize(), text_width, seed=0)
    load_weights(flux, path)
    return flux


def save_lora(path: Path, averaged: Mapping[str, Tensor], low_ranks: Mapping[str, LowRank], facts: Mapping[str, str]) -> Path:
    """Write the LoRA under the names that LoraLoader reads. `averaged` holds the weights of `trained_part` by their indices."""
    tensors = {}
    for number, name in enumerate(low_ranks):
        stem = f"diffusion_model.{published_name(name)}"
        tensors[f"{stem}.lora_B.weight"] = averaged[str(2 * number)].bfloat16().contiguous()
        tensors[f"{stem}.lora_A.weight"] = averaged[str(2 * number + 1)].bfloat16().contiguous()
    safetensors.torch.save_file(tensors, path, metadata={"modelspec.title": "miniature palette LoRA", **facts})
    return path
