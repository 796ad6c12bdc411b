"""What a student is trained to do, as pure functions; to add an objective, write a function and an entry of `OBJECTIVES`."""

# B batch, C channels (... any number of dimensions), L text tokens, D text width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gap:
    """Student and teacher at one step: text embeddings [B, L, D], and velocities [B, C, ...] for objectives that need them.

    own: how many rows of each text are its prompt's; None: all of them.
    """

    student_text_BLD: Tensor
    teacher_text_BLD: Tensor
    student_velocity: Tensor | None = None
    teacher_velocity: Tensor | None = None
    own: Sequence[int] | None = None


def velocity_gap(gap: Gap) -> Tensor:
    """Per-sample mean squared gap of the two velocity predictions, float32 [B]. Eq. 5 of arXiv:2503.19897."""
    assert gap.student_velocity is not None and gap.teacher_velocity is not None
    return _mean_squares(gap.student_velocity, gap.teacher_velocity)


def embedding_gap(gap: Gap) -> Tensor:
    """Per-sample mean squared gap of the two text embeddings, float32 [B]: the naive baseline, Eq. 4 of arXiv:2503.19897."""
    from torch import cat  # imported when called: recipes are read before torch is imported

    if gap.own is None:
        return _mean_squares(gap.student_text_BLD, gap.teacher_text_BLD)
    texts = zip(gap.student_text_BLD, gap.teacher_text_BLD, gap.own, strict=True)
    return cat([_mean_squares(student_LD[None, :own], teacher_LD[None, :own]) for student_LD, teacher_LD, own in texts])


def _mean_squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.float() - teacher.float()).square().mean(dim=tuple(range(1, student.ndim)))


@dataclass(frozen=True)
class Objective:
    """A loss, and whether it needs the diffusion model."""

    loss: Callable[[Gap], Tensor]
    needs_velocity: bool


OBJECTIVES: dict[str, Objective] = {
    "velocity": Objective(velocity_gap, needs_velocity=True),
    "embedding": Objective(embedding_gap, needs_velocity=False),
}
