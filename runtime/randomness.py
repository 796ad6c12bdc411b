"""The states of all random number generators of this process, saved and restored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .accelerator import accelerator_type, module_of

# The states that are not those of devices.
EVERYWHERE = {"python", "numpy", "torch", "generators"}
CHANGED = "dropout will differ from an uninterrupted run."


def random_states(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (CPU and every accelerator), and of `generators` by name, as CPU tensors."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (for libraries that use the global generator)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        **_device_states(),
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
    here = _device_states()
    notes = []
    for kind in sorted(({*states} | {*here}) - EVERYWHERE):
        before, now = states.get(kind, []), here.get(kind, [])
        if len(before) != len(now):
            notes.append(f"The run had {len(before)} {kind.upper()} devices and this machine has {len(now)}: {CHANGED}")
            continue
        for index, state in enumerate(before):
            module_of(kind).set_rng_state(state, index)  # pyright: ignore[reportOptionalMemberAccess]
    return notes


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore all generators of this process at the end of the context, whatever was drawn in it."""
    before = random_states({})
    try:
        yield
    finally:
        restore_random_states(before, {})


class RandomStream:
    """Random numbers of its own: they begin where the generators of this process are when it is made.

    states: where they are; what is drawn in `drawing` continues from there.
    """

    def __init__(self) -> None:
        self.states = random_states({})

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this stream while the context is open."""
        with undisturbed():
            restore_random_states(self.states, {})
            try:
                yield
            finally:
                self.states = random_states({})


def _device_states() -> dict[str, list[Tensor]]:
    """The states of the accelerators by type; empty without one."""
    kind = accelerator_type()
    module = module_of(kind)
    return {} if kind is None or module is None else {kind: [module.get_rng_state(index) for index in range(module.device_count())]}
