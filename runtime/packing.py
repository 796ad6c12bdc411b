"""Nested Python values with tensors as JSON and named tensors, and back, without loss: types, floats and dtypes stay the same to the bit.

Nothing that is read is executed.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

Json = Any
# Lists, strings, integers, finite floats, booleans and None are plain JSON; everything else is an object with one key.
TENSOR, TUPLE, DICT, FLOAT = "tensor", "tuple", "dict", "float"


def pack(value: Any, tensors: dict[str, Tensor], name: str, copy: bool = True) -> Json:
    """The JSON form of `value`; its tensors are added to `tensors`, on the CPU, under names that begin with `name`.

    Without `copy`, tensors that are contiguous on the CPU are not copied. Raises TypeError for a type that cannot be unpacked.
    """
    if isinstance(value, Tensor):
        while name in tensors:  # the keys 0 and "0" of one dict
            name += "'"
        tensors[name] = value.detach().to("cpu", copy=copy).contiguous()
        return {TENSOR: name}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):  # NumPy's float64 is one
        return float(value) if math.isfinite(value) else {FLOAT: str(float(value))}
    if type(value) is list:
        return [pack(part, tensors, f"{name}.{index}", copy) for index, part in enumerate(value)]
    if type(value) is tuple:
        return {TUPLE: [pack(part, tensors, f"{name}.{index}", copy) for index, part in enumerate(value)]}
    if isinstance(value, dict):
        return {DICT: [[_key(key, name), pack(part, tensors, f"{name}.{key}", copy)] for key, part in value.items()]}
    raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists, tuples and dicts of them.")


def unpack(packed: Json, tensors: dict[str, Tensor]) -> Any:
    """The value that `pack` packed."""
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    [(kind, content)] = packed.items()
    if kind == TENSOR:
        return tensors[content]
    if kind == FLOAT:
        return float(content)
    parts = content if kind == TUPLE else [part for _key, part in content]
    unpacked = [unpack(part, tensors) for part in parts]
    return tuple(unpacked) if kind == TUPLE else dict(zip([key for key, _part in content], unpacked, strict=True))


def _key(key: Any, name: str) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"{name} has the key {key!r}; keys in a checkpoint are strings or integers.")
    return key
