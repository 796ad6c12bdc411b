"""Random weights for models whose pictures nobody looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random float32 weights that keep activations near 1: norms 1, biases 0, token tables of deviation 1, the rest 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _weight(name, shape, generator) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    deviation = 1.0 if "shared" in name else math.prod(shape[1:]) ** -0.5
    # T5 does not divide attention by the root of the head's width; it draws queries that much smaller instead.
    return torch.randn(shape, generator=generator) * (deviation / 4 if name.endswith(".q.weight") else deviation)
