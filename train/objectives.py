"""What a student is trained to do, as pure functions; adding one is a function and an entry of `OBJECTIVES`."""

# B batch, C H W latent, L text tokens, D text width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """Student and teacher at one step: text embeddings [B, L, D], and velocities [B, C, H, W] for objectives that need them."""

    student_text_BLD: Tensor
    teacher_text_BLD: Tensor
    student_velocity_BCHW: Tensor | None = None
    teacher_velocity_BCHW: Tensor | None = None


def velocity_gap(gap: Gap) -> Tensor:
    """Per-sample mean squared gap of the two velocity predictions, float32 [B]. Eq. 5 of arXiv:2503.19897."""
    assert gap.student_velocity_BCHW is not None and gap.teacher_velocity_BCHW is not None
    return (gap.student_velocity_BCHW.float() - gap.teacher_velocity_BCHW.float()).square().mean(dim=(1, 2, 3))


def embedding_gap(gap: Gap) -> Tensor:
    """Per-sample mean squared gap of the two text embeddings, float32 [B]: the naive baseline, Eq. 4 of arXiv:2503.19897."""
    return (gap.student_text_BLD.float() - gap.teacher_text_BLD.float()).square().mean(dim=(1, 2))


@dataclass(frozen=True)
class Objective:
    """A loss, and whether it needs the diffusion model at all."""

    loss: Callable[[Gap], Tensor]
    needs_velocity: bool


OBJECTIVES: dict[str, Objective] = {
    "velocity": Objective(velocity_gap, needs_velocity=True),
    "embedding": Objective(embedding_gap, needs_velocity=False),
}
