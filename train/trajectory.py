"""The teacher's own denoising trajectory, and the student's distance from it at every step. Algorithm 1 of arXiv:2503.19897."""

# B batch, C H W latent, L text tokens, D text width, P pooled width, T steps

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .objectives import Gap, Objective

LATENT_CHANNELS = 16
LATENT_CELL_PX = 8
Choice = TypeVar("Choice", int, float)


class Flow(Protocol):
    """A frozen diffusion model as a velocity function."""

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, pooled_BP: Tensor, guidance_B: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Draw:
    """What chance decides about one trajectory: noise x_T [B, C, H, W], guidance [B] (None for guidance-free models), token length."""

    noise_BCHW: Tensor
    guidance_B: Tensor | None
    token_length: int


def draw(seed: int, index: int, batch: int, side_px: int, guidance: tuple[float, ...], lengths: tuple[int, ...]) -> Draw:
    """Draw batch `index`: a pure function of its arguments, so that a resumed run and another number of GPUs draw the same."""
    # Hashed, because torch's CPU generator keeps the low 32 bits of a seed alone.
    digest = hashlib.blake2b(f"draw {seed} {index}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    side = side_px // LATENT_CELL_PX
    noise_BCHW = torch.randn(batch, LATENT_CHANNELS, side, side, generator=generator)
    scales = torch.tensor([_one_of(guidance, generator) for _ in range(batch)]) if guidance else None
    return Draw(noise_BCHW, scales, _one_of(lengths, generator))


def _one_of(choices: tuple[Choice, ...], generator: torch.Generator) -> Choice:
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


@dataclass(frozen=True)
class Position:
    """Where a batch is on the teacher's trajectory: step index, latent, and all that the velocity depends on."""

    step: int
    x_BCHW: Tensor
    sigmas_T: Tensor
    text_BLD: Tensor
    pooled_BP: Tensor
    guidance_B: Tensor | None
    token_ids_BL: Tensor

    @property
    def done(self) -> bool:
        return self.step == len(self.sigmas_T) - 1

    def sigma_B(self) -> Tensor:
        return self.sigmas_T[self.step].to(self.x_BCHW).expand(len(self.x_BCHW))


def gap_at(position: Position, flow: Flow, student: Callable[[Tensor], Tensor], objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Per-sample loss [B] with gradients to the student, and the teacher's velocity (None if the objective does without).

    The diffusion model sees teacher's and student's embedding at the same latent, noise level and guidance.
    """
    student_text_BLD = student(position.token_ids_BL)
    if not objective.needs_velocity:
        return objective.loss(Gap(student_text_BLD, position.text_BLD)), None
    sigma_B = position.sigma_B()
    with torch.no_grad():
        teacher_velocity = flow.velocity(position.x_BCHW, sigma_B, position.text_BLD, position.pooled_BP, position.guidance_B)
    student_velocity = flow.velocity(position.x_BCHW, sigma_B, student_text_BLD, position.pooled_BP, position.guidance_B)
    return objective.loss(Gap(student_text_BLD, position.text_BLD, student_velocity, teacher_velocity)), teacher_velocity


def advance(position: Position, teacher_velocity_BCHW: Tensor | None) -> Position:
    """One Euler step along the teacher's velocity; an objective that needs no latent leaves it where it is."""
    x_BCHW = position.x_BCHW
    if teacher_velocity_BCHW is not None:
        step_size = position.sigmas_T[position.step + 1] - position.sigmas_T[position.step]
        # A velocity that is not finite would spoil the rest of the trajectory: the latent waits for the next one.
        usable = torch.where(teacher_velocity_BCHW.isfinite().all(), teacher_velocity_BCHW, torch.zeros_like(teacher_velocity_BCHW))
        x_BCHW = x_BCHW + step_size.to(x_BCHW) * usable
    return replace(position, step=position.step + 1, x_BCHW=x_BCHW)


@torch.no_grad()
def walk(position: Position, flow: Flow, student: Callable[[Tensor], Tensor], objective: Objective) -> Iterator[tuple[float, Tensor]]:
    """Follow a whole trajectory without training: noise level and per-sample loss [B] of each step."""
    while not position.done:
        loss_B, velocity = gap_at(position, flow, student, objective)
        yield float(position.sigmas_T[position.step]), loss_B
        position = advance(position, velocity)
