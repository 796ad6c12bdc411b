"""The states of all random number generators of this process, taken and given back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (CPU and every GPU), and of `generators` by name; tensors are on the CPU."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (libraries that use the global generator are why it is stored)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def restore_random_states(states: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> list[str]:
    """Give the generators their states back; returns sentences about what this machine has no place for.

    Raises ValueError if `generators` are called otherwise than those whose states were taken.
    """
    if set(states["generators"]) != set(generators):
        raise ValueError(f"Random states are of {sorted(states['generators'])}, but the generators are {sorted(generators)}.")
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for name, generator in generators.items():
        generator.set_state(states["generators"][name])
    notes = []
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states["cuda"]) == gpus:
        torch.cuda.set_rng_state_all(states["cuda"])
    else:
        notes.append(_elsewhere(len(states["cuda"]), gpus, "CUDA devices"))
    if not torch.backends.mps.is_available():
        notes += [_elsewhere(1, 0, "MPS devices")] * len(states["mps"])
    elif states["mps"]:
        torch.mps.set_rng_state(states["mps"][0])
    return notes


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn while the context is open, afterwards the generators of this process stand where they stood before."""
    before = random_states({})
    try:
        yield
    finally:
        restore_random_states(before, {})


def _elsewhere(before: int, now: int, what: str) -> str:
    return f"The run had {before} {what} and this machine has {now}: dropout will not be what it would have been there."
