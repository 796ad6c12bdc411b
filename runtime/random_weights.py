"""Random weights for models whose output nobody judges."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random float32 weights, each as `draw_weight` makes it."""
    generator = torch.Generator().manual_seed(seed)
    return {name: draw_weight(name, shape, generator) for name, shape in shapes.items()}


def draw_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A float32 weight that keeps activations near 1: norms 1, biases 0, embeddings of deviation 1, the rest 1/sqrt(inputs)."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    deviation = 1.0 if "shared" in name or "embedding" in name else math.prod(shape[1:]) ** -0.5
    # T5 does not divide attention scores by the root of the head width; its queries are initialised that much smaller.
    return torch.randn(shape, generator=generator) * (deviation / 4 if name.endswith(".q.weight") else deviation)
