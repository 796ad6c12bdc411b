"""The teacher's own denoising trajectory, and the student's distance from it at every step. Algorithm 1 of arXiv:2503.19897."""

# B batch, C channels (... any number of dimensions), L text tokens, D text width, T steps

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..diffusion.denoise import Entry, euler_step, for_batch, guided
from ..diffusion.partial_pass import keys_and_values, streams_after
from ..encoder.rows import Rows
from .objectives import OBJECTIVES, Gap, Objective

if TYPE_CHECKING:
    from ..diffusion.frozen import FrozenModel
    from ..encoder.teacher_text import TeacherText

Choice = TypeVar("Choice", int, float)


class VelocityModel(Protocol):
    """A frozen diffusion model as a function; see `diffusion.frozen.FrozenModel`."""

    def velocity(
        self, x: Tensor, sigma_B: Tensor, text_BLD: Tensor, extras: Mapping[str, Any], guidance_B: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Draw:
    """The random choices of one trajectory: noise [B, C, ...], guidance [B] or None, token length, CFG [B] or None."""

    noise: Tensor
    guidance_B: Tensor | None
    token_length: int
    cfg_B: Tensor | None = None


def draw(
    seed: int,
    index: int,
    batch: int,
    latent_shape: Sequence[int],
    guidance: Sequence[float],
    lengths: Sequence[int],
    cfg: Sequence[float] = (),
) -> Draw:
    """Draw batch `index`: a pure function of its arguments, so that a resumed run and another number of GPUs draw the same."""
    # Hashed, because torch's CPU generator keeps only the low 32 bits of a seed.
    digest = hashlib.blake2b(f"draw {seed} {index}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    noise = torch.randn(batch, *latent_shape, generator=generator)
    scales = torch.tensor([_one_of(guidance, generator) for _ in range(batch)]) if guidance else None
    length = _one_of(lengths, generator)
    return Draw(noise, scales, length, torch.tensor([_one_of(cfg, generator) for _ in range(batch)]) if cfg else None)


def _one_of(choices: Sequence[Choice], generator: torch.Generator) -> Choice:
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


@dataclass(frozen=True)
class Position:
    """Where a batch is on the teacher's trajectory: step index, latent [B, C, ...], and all that the velocity depends on.

    text_BLD and extras are the teacher's conditioning entry; token_ids_BL is what the student encodes. rows: what of text_BLD, or of the
    student's, is the text of each sample, where it is not all of it. cfg_B and unconditional: CFG by sample, and the teacher's entry of the
    empty prompt, where the teacher's trajectory is guided.
    """

    step: int
    x: Tensor
    sigmas_T: Tensor
    text_BLD: Tensor
    extras: Mapping[str, Any]
    guidance_B: Tensor | None
    token_ids_BL: Tensor
    rows: Rows | None = None
    cfg_B: Tensor | None = None
    unconditional: Entry | None = None

    @property
    def done(self) -> bool:
        return self.step == len(self.sigmas_T) - 1

    @property
    def sigma(self) -> float:
        """The noise level of the next step."""
        return float(self.sigmas_T[self.step])

    def velocity(self, model: VelocityModel, text_BLD: Tensor) -> Tensor:
        """The velocity here, with a text embedding in place of the teacher's."""
        return self.by_group(lambda place, text: (place._velocity(model, text),), text_BLD)[0]

    def by_group(self, of: Callable[..., tuple[Tensor, ...]], *texts: Tensor) -> tuple[Tensor, ...]:
        """What `of` returns, [B, ...] each: it is given the samples whose texts have one length, and these texts with companions' rows."""
        if self.rows is None:
            return of(self, *texts)
        groups = self.rows.groups
        found = [of(self._of(group), *(self.rows.text(text_BLD, group) for text_BLD in texts)) for group in groups]
        order = torch.tensor([place for group in groups for place in group], device=self.x.device).argsort()
        return tuple(torch.cat(parts)[order] for parts in zip(*found, strict=True))

    def _velocity(self, model: VelocityModel, text_BLD: Tensor) -> Tensor:
        return model.velocity(self.x, self._sigma_B, text_BLD, self.extras, self.guidance_B)

    def seen(self, model: FrozenModel, text_BLD: Tensor, objective: Objective, to_the_end: bool) -> tuple[Sequence[Tensor], Tensor | None]:
        """What the objective compares inside the diffusion model, [B, ...] each, and the velocity if the pass goes `to_the_end`.

        All texts have one length.
        """
        run = functools.partial(self._velocity, model, text_BLD)
        if objective.at == "keys_values":
            return keys_and_values(model, run, len(self.x)), None
        streams, velocity = streams_after(model, objective.blocks, run, to_the_end)
        return [streams["text"]] if objective.at == "text_stream" else list(streams.values()), velocity

    def whole(self, text_BLD: Tensor) -> Tensor:
        """The text [1, K + L, D] of a single sample, with the rows that the student does not make."""
        return text_BLD if self.rows is None else self.rows.text(text_BLD, [0])

    @property
    def _sigma_B(self) -> Tensor:
        return self.sigmas_T[self.step].to(self.x).expand(len(self.x))

    def _of(self, group: Sequence[int]) -> Position:
        """The position of some samples, whose texts have one length."""
        places = list(group)
        extras = {name: value[places] if isinstance(value, Tensor) else value for name, value in self.extras.items()}
        guidance_B = None if self.guidance_B is None else self.guidance_B[places]
        return replace(self, x=self.x[places], extras=extras, guidance_B=guidance_B, rows=None)

    def guided(self, model: VelocityModel, conditional: Tensor) -> Tensor:
        """What the teacher's trajectory follows: its velocity for the prompts, guided away from that for the empty prompt."""
        if self.cfg_B is None or self.unconditional is None:
            return conditional
        entry = for_batch(self.unconditional, len(self.x))
        return guided(conditional, model.velocity(self.x, self._sigma_B, *entry, self.guidance_B), self.cfg_B.to(self.x))


def start(model: FrozenModel, steps: int, drawn: Draw, text: TeacherText) -> Position:
    """The start of a trajectory of so many steps, on the diffusion model's device."""
    device, empty = model.device, text.empty
    sigmas_T = model.training_sigmas(steps, *drawn.noise.shape[-2:])
    return Position(
        step=0,
        x=model.noisy(drawn.noise.to(device), sigmas_T),
        sigmas_T=sigmas_T,
        text_BLD=text.text_BLD.to(device),
        extras=text.extras(device),
        guidance_B=None if drawn.guidance_B is None else drawn.guidance_B.to(device),
        token_ids_BL=text.token_ids_BL.to(device),
        rows=None if text.rows is None else text.rows.to(device),
        cfg_B=drawn.cfg_B,
        unconditional=None if empty is None else (empty.whole.to(device), empty.extras(device)),
    )


def gaps_at(
    position: Position, model: VelocityModel, students: Sequence[Callable[[Tensor], Tensor]], objective: Objective
) -> tuple[Iterator[Tensor], Tensor | None]:
    """Per-sample loss [B] of each student, with gradients to it, and the velocity that the teacher follows (None if nothing needs it).

    The teacher's side is computed once. A student's is computed when its loss is taken, so that one graph at a time need exist.

    The diffusion model gets the teacher's and the student's embedding at the same latent, noise level and guidance. `text_stream` and
    `keys_values` always compare at the noise with which a trajectory starts. With classifier-free guidance of weight w on both sides and
    the teacher's unconditional velocity on both, the loss would be w^2 times this one: so CFG only decides where the teacher's trajectory
    goes.
    """
    if objective.at == "velocity":
        gap_of, followed = _velocity_gaps(position, model, objective)
    elif objective.needs_model:
        gap_of, followed = _gaps_inside(position, cast("FrozenModel", model), objective)
    else:
        gap_of, followed = _text_gaps(position, model, objective), None
    return (gap_of(student(position.token_ids_BL)) for student in students), followed


def _text_gaps(position: Position, model: VelocityModel, objective: Objective) -> Callable[[Tensor], Tensor]:
    """The loss of a student's text, or of what the diffusion model's text projection makes of it."""
    own, variance_D = None if position.rows is None else position.rows.own, objective.variance_D
    if objective.at == "embedding":
        return lambda student_BLD: objective.loss(Gap(student_BLD, position.text_BLD, own=own, variance_D=variance_D))
    projected = cast("FrozenModel", model).text_projection
    with torch.no_grad():
        teacher_BLD = projected(position.text_BLD.float())
    return lambda student_BLD: objective.loss(Gap(projected(student_BLD.float()), teacher_BLD, own=own, variance_D=variance_D))


def _velocity_gaps(position: Position, model: VelocityModel, objective: Objective) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss of a student's text, and the velocity that the teacher follows."""
    with torch.no_grad():
        teacher_velocity = position.velocity(model, position.text_BLD)
        followed = position.guided(model, teacher_velocity)

    def gap_of(student_BLD: Tensor) -> Tensor:
        return objective.loss(Gap(student_BLD, position.text_BLD, position.velocity(model, student_BLD), teacher_velocity))

    return gap_of, followed


def compared_at(position: Position, objective: Objective) -> Position:
    """Where the objective compares: what it sees of the model without a trajectory, at the start of one."""
    return replace(position, step=0) if objective.needs_model and not objective.needs_velocity else position


def _gaps_inside(position: Position, model: FrozenModel, objective: Objective) -> tuple[Callable[[Tensor], Tensor], Tensor | None]:
    """The loss of what is seen of a student's text in the model's blocks, and the velocity that the teacher follows.

    Only the teacher's pass goes to its end, and only where its trajectory goes on.
    """
    goes_on, compared = objective.needs_velocity and position.step + 2 < len(position.sigmas_T), compared_at(position, objective)
    # One entry for each group of samples whose texts have one length.
    taught: list[Sequence[Tensor]] = []

    def teach(place: Position, teacher_BLD: Tensor) -> tuple[Tensor, ...]:
        seen, velocity = place.seen(model, teacher_BLD, objective, to_the_end=goes_on)
        taught.append(seen)
        return () if velocity is None else (velocity,)

    def gap_of(student_BLD: Tensor) -> Tensor:
        groups = iter(taught)

        def of_group(place: Position, student_BLD: Tensor, teacher_BLD: Tensor) -> tuple[Tensor]:
            seen, _ = place.seen(model, student_BLD, objective, to_the_end=False)
            return (objective.loss(Gap(student_BLD, teacher_BLD, student_seen=seen, teacher_seen=next(groups))),)

        return compared.by_group(of_group, student_BLD, position.text_BLD)[0]

    with torch.no_grad():
        velocities = compared.by_group(teach, position.text_BLD)
        return gap_of, position.guided(model, velocities[0]) if velocities else None


def advance(position: Position, teacher_velocity: Tensor | None) -> Position:
    """One Euler step along the teacher's velocity; an objective that needs no velocity leaves the latent unchanged."""
    x, step = position.x, position.step
    if teacher_velocity is not None:
        # A velocity that is not finite would spoil the rest of the trajectory: the latent stays until the next step.
        usable = torch.where(teacher_velocity.isfinite().all(), teacher_velocity, torch.zeros_like(teacher_velocity))
        x = euler_step(x, usable, position.sigmas_T[step], position.sigmas_T[step + 1])
    return replace(position, step=step + 1, x=x)


@torch.no_grad()
def gaps_by_band(
    position: Position, model: VelocityModel, students: Sequence[Callable[[Tensor], Tensor]], bands: int
) -> Iterator[tuple[str, list[Tensor]]]:
    """Follow a trajectory without training: the band of each step, and each student's per-sample velocity gap [B]."""
    name = band_name if float(position.sigmas_T.max()) <= 1 else _unbounded_band_name
    while not position.done:
        gaps_B, velocity = gaps_at(position, model, students, OBJECTIVES["velocity"])
        yield name(position.sigma, bands), list(gaps_B)
        position = advance(position, velocity)


def band_name(sigma: float, bands: int) -> str:
    """The band of equal width of (0, 1] that contains a flow model's noise level, such as `0.50-0.75`."""
    number = min(bands - 1, max(0, int(sigma * bands - 1e-9)))
    return f"{number / bands:.2f}-{(number + 1) / bands:.2f}"


def _unbounded_band_name(sigma: float, bands: int) -> str:
    """For noise levels beyond 1, as of models that predict noise: the share of noise takes the place of the level."""
    return band_name(sigma / (1 + sigma), bands)
