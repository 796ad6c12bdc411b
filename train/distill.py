"""One optimizer step: embed the prompts, compare the student with the teacher, backward, clip, step; and the teacher's next positions."""

# B batch, C H W latent, L text tokens, D text width

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ..runtime.randomness import RandomStream, undisturbed
from .objectives import Objective
from .optimizer import MuonAndAdamW, make_optimizer, set_rate
from .trajectory import Position, VelocityModel, advance, compared_at, gaps_at

if TYPE_CHECKING:
    from ..diffusion.frozen import FrozenModel
    from ..runtime.ranks import Ranks
    from ..students.trained import TrainedStudent
    from .recipe import Recipe

SKIPS_IN_A_ROW = 10


# What can be the first not finite part of a step, in the order of computation, and what to do about each.
SLOWER = "start a new run with student.start = the student.safetensors of a checkpoint, and a lower optimizer.learning_rate"
WIDER = 'diffusion_model.dtype = "bf16" or "fp32"'
CURES = {
    "the teacher's text embedding or pooled vector": "check or replace the files that [teacher] names; where they are intact, "
    "their arithmetic overflows: start ComfyUI with --fp32-text-enc, the command with -- --fp32-text-enc.",
    "the diffusion model's velocity for the teacher's text": "check or replace diffusion_model.file; where it is intact, its arithmetic "
    f"overflows: start a new run with {WIDER}.",
    "the student's text embedding": f'{SLOWER} or optimizer.autocast = "none".',
    "the loss, though the texts of teacher and student are finite": f"{SLOWER} or {WIDER}.",
    "the gradient, though the loss is finite": f"{SLOWER} or {WIDER}.",
}


class NotFinite(RuntimeError):
    """Ten steps in a row, or the student's weights, were not finite: the run stops, with its state saved."""


@dataclass
class Learner:
    """Student, optimizer, learning rate by step, and how they are run.

    `step` counts the steps of the run, including the `skipped` ones that changed no weight. `not_finite`: what was not finite in the
    last skipped one. name, random: of one of several students, and what it draws from, so that it is trained as it would be alone.
    """

    student: Module
    optimizer: Optimizer | MuonAndAdamW
    learning_rate: Callable[[int], float]
    max_gradient_norm: float
    autocast_dtype: torch.dtype | None
    device: torch.device
    mean_over_ranks: Callable[[Tensor], Tensor]
    without_sync: Callable[[], contextlib.AbstractContextManager[Any]]
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    not_finite: str = ""
    random: RandomStream | None = None
    name: str = ""

    def embed(self, token_ids_BL: Tensor) -> Tensor:
        """Text embeddings [B, L, D] in the recipe's precision; weights stay float32."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None))
            if self.random is not None:
                stack.enter_context(self.random.drawing())
            return self.student(token_ids_BL.to(self.device))

    @property
    def _who(self) -> str:
        return f"Student {self.name}: " if self.name else ""

    @property
    def lost(self) -> bool:
        """Whether so many steps in a row were dropped that the run must stop."""
        return self.skipped_in_a_row >= SKIPS_IN_A_ROW

    def check_not_lost(self) -> None:
        """Raise NotFinite at the tenth dropped step in a row."""
        if self.lost:
            raise NotFinite(
                f"{self._who}{SKIPS_IN_A_ROW} steps in a row were not finite. In the last one, the first part that was not finite is "
                f"{self.not_finite}.\nWhat to do: {CURES[self.not_finite]}"
            )

    def check_weights(self) -> None:
        """Raise NotFinite if a weight of the student is not finite: such weights must not replace a good checkpoint."""
        if not all(weight.isfinite().all() for weight in self.student.parameters()):
            raise NotFinite(
                f"{self._who}At step {self.step} the student's weights are no longer finite. "
                "This step is not saved; earlier checkpoints are.\n"
                "What to do: start a new run with a lower optimizer.learning_rate or more optimizer.warmup_steps, from student.start = the "
                "student.safetensors of a checkpoint if there is one."
            )


def new_learner(recipe: Recipe, ranks: Ranks, student: TrainedStudent, model: FrozenModel, name: str = "") -> Learner:
    """The learner of a run before its first step, of one of several students with its name."""
    wrapped = ranks.wrap(student)
    ranks.warm_up(wrapped, torch.zeros(1, 2, dtype=torch.long))
    part = recipe.optimizer
    return Learner(
        student=wrapped,
        optimizer=make_optimizer(student, part.learning_rate, (part.beta1, part.beta2), part.weight_decay, part.muon_learning_rate),
        learning_rate=linear_schedule(part.learning_rate, part.warmup_steps, *recipe.periods),
        max_gradient_norm=part.max_gradient_norm,
        autocast_dtype=torch.bfloat16 if part.autocast == "bf16" else None,
        device=model.device,
        mean_over_ranks=ranks.mean,
        without_sync=functools.partial(ranks.no_sync, wrapped),
        scaler=loss_scaler(model),
        name=name,
    )


def loss_scaler(model: FrozenModel) -> GradScaler:
    """Scales the loss for the backward pass where the diffusion model computes in fp16, in which small gradients become zero.

    It scales by powers of two, so that unscaled gradients are exact. Other formats are not scaled.
    """
    return GradScaler(model.device.type, enabled=model.compute_dtype == torch.float16)


def linear_schedule(peak: float, warmup_steps: int, *periods: int) -> Callable[[int], float]:
    """Learning rate of each step, in periods of so many steps, one after another.

    In each it rises linearly over `warmup_steps` to `peak`, then falls linearly towards 0 at the period's end.
    """
    starts = [0, *itertools.accumulate(periods[:-1])]

    def learning_rate(step: int) -> float:
        number = bisect.bisect_right(starts, step) - 1
        step, steps = step - starts[number], periods[number]
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        return peak * max(0.0, (steps - step) / max(1, steps - warmup_steps))

    return learning_rate


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: mean loss over ranks, noise level, gradient norm before clipping, whether the step was dropped."""

    loss: float
    sigma: float
    gradient_norm: float
    learning_rate: float
    dropped: bool


def train_step(
    positions: Sequence[Position], model: VelocityModel, learners: Sequence[Learner], objective: Objective
) -> tuple[list[StepReport], list[Position]]:
    """One optimizer step of each student over the micro-batches at `positions`; returns where the teacher's velocity takes them.

    What the teacher does is computed once, and one student's graph exists at a time. A loss or gradient that is not finite on any rank
    drops the student's step on all; see `Learner.check_not_lost`.
    """
    steps, moved, velocities = [], [], []
    totals = [torch.zeros((), device=learner.device) for learner in learners]
    sigma = compared_at(positions[0], objective).sigma
    for number, position in enumerate(positions, start=1):
        last = number == len(positions)
        losses_B, velocity = gaps_at(position, model, [learner.embed for learner in learners], objective)
        velocities.append(velocity)
        for place, learner in enumerate(learners):
            with contextlib.nullcontext() if last else learner.without_sync():
                loss = next(losses_B).mean() / len(positions)
                learner.scaler.scale(loss).backward()
            totals[place] = totals[place] + loss.detach()
            if last:
                # Now, so that with one micro-batch the gradients of one student at a time exist.
                steps.append(_update(learner, totals[place], sigma, positions, velocities))
        moved.append(advance(position, velocity))
    return steps, moved


def _update(
    learner: Learner, total: Tensor, sigma: float, positions: Sequence[Position], velocities: Sequence[Tensor | None]
) -> StepReport:
    """Clip a student's gradient and step its optimizer, unless something is not finite."""
    loss = float(learner.mean_over_ranks(total))
    learner.scaler.unscale_(cast(Optimizer, learner.optimizer))
    norm = float(clip_grad_norm_(learner.student.parameters(), learner.max_gradient_norm))
    dropped = not (math.isfinite(loss) and math.isfinite(norm))
    learning_rate = learner.learning_rate(learner.step)
    if dropped:
        learner.not_finite = _first_not_finite(positions, velocities, learner, loss)
    else:
        set_rate(learner.optimizer, learning_rate)
        learner.scaler.step(cast(Optimizer, learner.optimizer))
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    _count(learner, dropped)
    return StepReport(loss, sigma, norm, learning_rate, dropped)


@torch.no_grad()
def _first_not_finite(positions: Sequence[Position], velocities: Sequence[Tensor | None], learner: Learner, loss: float) -> str:
    """What in a dropped step is not finite, on any rank: a key of CURES."""
    with undisturbed():
        embeddings = [replace(learner, random=None).embed(position.token_ids_BL) for position in positions]
    inputs = [value for position in positions for value in (position.text_BLD, *position.extras.values())]
    parts = [inputs, velocities, embeddings, [torch.tensor(loss)]]
    broken = [not all(value.isfinite().all() for value in part if isinstance(value, Tensor)) for part in parts]
    on_ranks = learner.mean_over_ranks(torch.tensor(broken, dtype=torch.float32, device=learner.device))
    return next(itertools.compress(CURES, [*(on_ranks > 0).tolist(), True]))


def _count(learner: Learner, dropped: bool) -> None:
    learner.step += 1
    learner.skipped += dropped
    learner.skipped_in_a_row = learner.skipped_in_a_row + 1 if dropped else 0
