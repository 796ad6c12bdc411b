"""Equality to the last bit, for tests of what must come back exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(value: Any, other: Any) -> bool:
    """Whether two values are equal in every type, dtype and bit."""
    if type(value) is not type(other):
        return False
    if isinstance(value, Tensor):
        if value.dtype != other.dtype or value.shape != other.shape:
            return False
        bytes_of_each = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (value, other)]
        return torch.equal(*bytes_of_each)
    if isinstance(value, dict):
        return list(value) == list(other) and all(same(part, other[key]) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same, value, other))
    return repr(value) == repr(other)
