"""States of training for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ...runtime.randomness import random_states
from ...train.state import TrainerState


def write_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors.torch.save_file(dict(tensors), path)


def some_state(step: int, best: float | None = None) -> TrainerState:
    """A state in which every number tells the step."""
    return TrainerState(
        step=step,
        skipped_steps=step // 2,
        student={"weight": torch.full((5, 3), float(step))},
        optimizer={
            "state": {0: {"exp_avg": torch.full((4,), float(step))}},
            "param_groups": [{"lr": 1 / (step + 3), "betas": (0.9, 0.999)}],
        },
        schedule={"last_epoch": step},
        rng=random_states({}),
        recipe_sha256="ab",
        best=best,
        position={"latent": torch.full((2,), float(step))},
    )
