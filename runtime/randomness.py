"""The states of all random number generators of this process, saved and restored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (CPU and every GPU), and of `generators` by name, as CPU tensors."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (for libraries that use the global generator)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "generators": {name: generator.get_state() for name, generator in generators.items()},
    }


def restore_random_states(states: Mapping[str, Any], generators: Mapping[str, torch.Generator]) -> list[str]:
    """Restore the states of the generators; returns sentences about states of devices that this machine does not have.

    Raises ValueError if the names of `generators` are not those whose states were saved.
    """
    if set(states["generators"]) != set(generators):
        raise ValueError(f"Random states: expected those of {sorted(generators)}, got {sorted(states['generators'])}.")
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
    """Restore all generators of this process at the end of the context, whatever was drawn in it."""
    before = random_states({})
    try:
        yield
    finally:
        restore_random_states(before, {})


def _elsewhere(before: int, now: int, what: str) -> str:
    return f"The run had {before} {what} and this machine has {now}: dropout will differ from an uninterrupted run."
