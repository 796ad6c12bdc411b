"""What a student is trained to do, as pure functions; to add an objective, write a function and an entry of `OBJECTIVES`."""

# B batch, C channels (... any number of dimensions), L text tokens, D text width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

# Of the channels' median variance; see `whitened_gap`.
FLOOR = 0.1
# What is constant has no scale. Where the median channel is constant too, the least variance is this share of the mean.
LEAST_VARIANCE, LEAST_SHARE = 1e-30, 1e-6


@dataclass(frozen=True)
class Gap:
    """Student and teacher at one step: text embeddings [B, L, D], and for objectives that need them velocities [B, C, ...].

    own: how many rows of each text are its prompt's; None: all of them. variance_D: the variance of each channel of the teacher's rows,
    over the run's prompts. student_seen, teacher_seen: what a text is, or makes of the image, inside the diffusion model, [B, ...] each.
    """

    student_text_BLD: Tensor
    teacher_text_BLD: Tensor
    student_velocity: Tensor | None = None
    teacher_velocity: Tensor | None = None
    own: Sequence[int] | None = None
    variance_D: Tensor | None = None
    student_seen: Sequence[Tensor] = ()
    teacher_seen: Sequence[Tensor] = ()


def velocity_gap(gap: Gap) -> Tensor:
    """Per-sample mean squared gap of the two velocity predictions, float32 [B]. Eq. 5 of arXiv:2503.19897."""
    assert gap.student_velocity is not None and gap.teacher_velocity is not None
    return _mean_squares(gap.student_velocity, gap.teacher_velocity)


def embedding_gap(gap: Gap) -> Tensor:
    """Per-sample mean squared gap of the two text embeddings, float32 [B]: the naive baseline, Eq. 4 of arXiv:2503.19897."""
    return _over_own_rows(gap, _mean_squares)


def scaled_gap(gap: Gap) -> Tensor:
    """The gap of the embeddings over the teacher's total variance, float32 [B]: the share of it that the student misses."""
    assert gap.variance_D is not None
    return embedding_gap(gap) / gap.variance_D.mean().clamp_min(LEAST_VARIANCE)


def whitened_gap(gap: Gap) -> Tensor:
    """The gap of the embeddings with every channel over its own variance, float32 [B].

    Of T5-XXL, few channels make up most of the plain gap. A channel that hardly varies counts as one with FLOOR of the median variance.
    """
    assert gap.variance_D is not None
    least = (FLOOR * gap.variance_D.median()).maximum(LEAST_SHARE * gap.variance_D.mean()).clamp_min(LEAST_VARIANCE)
    scale_D = gap.variance_D.clamp_min(least).rsqrt()
    return _over_own_rows(gap, lambda student, teacher: _mean_squares(student.float() * scale_D, teacher.float() * scale_D))


def whitened_cosine_gap(gap: Gap) -> Tensor:
    """The whitened gap plus the mean over tokens of 1 - cosine, float32 [B]."""
    return whitened_gap(gap) + _over_own_rows(gap, _one_less_cosine)


def seen_gap(gap: Gap) -> Tensor:
    """The gap inside the diffusion model, over the teacher's variance there, float32 [B]: the mean over what is seen.

    A sample's own variance is that at its noise level, so that all levels weigh alike.
    """
    pairs = list(zip(gap.student_seen, gap.teacher_seen, strict=True))
    assert pairs
    gaps_B = [_mean_squares(student, teacher) / _variance(teacher) for student, teacher in pairs]
    return sum(gaps_B[1:], gaps_B[0]) / len(pairs)


def _over_own_rows(gap: Gap, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A loss [B] of two texts over the rows that the diffusion model attends to: of unpadded prompts, each prompt's own."""
    from torch import cat  # imported when called: recipes are read before torch is imported

    if gap.own is None:
        return loss(gap.student_text_BLD, gap.teacher_text_BLD)
    texts = zip(gap.student_text_BLD, gap.teacher_text_BLD, gap.own, strict=True)
    return cat([loss(student_LD[None, :own], teacher_LD[None, :own]) for student_LD, teacher_LD, own in texts])


def _mean_squares(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.float() - teacher.float()).square().mean(dim=tuple(range(1, student.ndim)))


def _one_less_cosine(student_BLD: Tensor, teacher_BLD: Tensor) -> Tensor:
    from torch.nn.functional import cosine_similarity

    return 1 - cosine_similarity(student_BLD.float(), teacher_BLD.float(), dim=-1).mean(dim=1)


def _variance(teacher: Tensor) -> Tensor:
    return teacher.float().flatten(1).var(dim=1).clamp_min(LEAST_VARIANCE)


@dataclass(frozen=True)
class Objective:
    """A loss, and where it compares student and teacher.

    at: the embeddings, these after the diffusion model's text projection, keys and values of the text in its first block, the text after
    its first blocks, the streams of text and image there, or its velocity. scaled: whether the loss takes the teacher's variance. blocks:
    how many blocks come before; variance_D: the teacher's; a run fills in both.
    """

    loss: Callable[[Gap], Tensor]
    at: Literal["embedding", "projection", "keys_values", "text_stream", "streams", "velocity"] = "velocity"
    scaled: bool = False
    blocks: int = 0
    variance_D: Tensor | None = None

    @property
    def needs_velocity(self) -> bool:
        """Whether the latent follows the teacher's trajectory; else it stays where the trajectory starts."""
        return self.at in ("streams", "velocity")

    @property
    def needs_model(self) -> bool:
        """Whether a step runs blocks of the diffusion model."""
        return self.at not in ("embedding", "projection")

    @property
    def takes_blocks(self) -> bool:
        """Whether it compares after a number of blocks."""
        return self.at in ("text_stream", "streams")


OBJECTIVES: dict[str, Objective] = {
    "velocity": Objective(velocity_gap),
    "early": Objective(seen_gap, at="streams"),
    "text_stream": Objective(seen_gap, at="text_stream"),
    "keys_values": Objective(seen_gap, at="keys_values"),
    "projected": Objective(scaled_gap, at="projection", scaled=True),
    "whitened": Objective(whitened_gap, at="embedding", scaled=True),
    "whitened_cosine": Objective(whitened_cosine_gap, at="embedding", scaled=True),
    "scaled": Objective(scaled_gap, at="embedding", scaled=True),
    "embedding": Objective(embedding_gap, at="embedding"),
}
