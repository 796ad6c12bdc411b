"""The held-out loss: prompts never trained on, noise always the same, by band of noise level."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import Module

from ..encoder.teacher_text import TeacherText
from .curves import ONE_BAND
from .objectives import Objective
from .teacher_chunks import texts_of
from .trajectory import Position, gaps_at, gaps_by_band
from .workshop import Workshop


@contextlib.contextmanager
def without_dropout(student: Module) -> Iterator[None]:
    """Switch dropout off while the context is open; afterwards it is as before, whatever happens inside."""
    training = student.training
    student.train(False)
    try:
        yield
    finally:
        student.train(training)


class HeldOut:
    """The held-out prompts of this process.

    The teacher encodes them once; its texts stay in RAM: prompts x tokens x text width x 4 bytes.
    """

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        self._texts: list[TeacherText] | None = None

    @torch.no_grad()
    def losses(self) -> tuple[list[dict[str, float]], int]:
        """Each student's mean velocity gap by band over all processes, and the number of prompts. Dropout is off meanwhile.

        In a run without the diffusion model: the mean loss of the last stage's objective, as one band.
        """
        workshop, recipe = self.workshop, self.workshop.recipe
        # All processes must ask for it, also those without a batch.
        objective = None if recipe.needs_diffusion_model else workshop.objective(len(recipe.stages) - 1)
        batches = workshop.schedule.held_out_batches()
        if self._texts is None:
            self._texts = texts_of(workshop.teacher, batches)
        sums: list[dict[str, tuple[float, int]]] = [{} for _ in workshop.all]
        with contextlib.ExitStack() as stack:
            for one in workshop.all:
                stack.enter_context(without_dropout(one.student))
            for batch, text in zip(batches, self._texts, strict=True):
                [position] = workshop.starts([batch], [text], workshop.recipe.sampling.steps)
                for band, losses_B in self._gaps(position, objective):
                    for own, loss_B in zip(sums, losses_B, strict=True):
                        total, count = own.get(band, (0.0, 0))
                        own[band] = (total + float(loss_B.double().sum()), count + len(loss_B))
        return [_mean_over_ranks(workshop.ranks.gather(own)) for own in sums], len(workshop.schedule.held_out)

    def _gaps(self, position: Position, objective: Objective | None) -> Iterator[tuple[str, Iterable[Tensor]]]:
        workshop, students = self.workshop, [one.embed for one in self.workshop.all]
        if objective is None:
            yield from gaps_by_band(position, workshop.model, students, workshop.recipe.validation.sigma_bands)
        else:
            yield ONE_BAND, gaps_at(position, workshop.model, students, objective)[0]


def _mean_over_ranks(gathered: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    names = sorted({name for sums in gathered for name in sums}, reverse=True)
    totals = {name: [sums[name] for sums in gathered if name in sums] for name in names}
    return {name: sum(total for total, _ in parts) / sum(count for _, count in parts) for name, parts in totals.items()}


def lower(best: float | None, reached: float) -> float:
    """The lower of two held-out losses; one that is not finite is never kept as the best."""
    return reached if best is None or not math.isfinite(best) else min(best, reached)
