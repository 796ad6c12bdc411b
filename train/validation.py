"""The held-out loss: prompts never trained on, noise always the same, by band of noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .objectives import OBJECTIVES
from .trajectory import walk

if TYPE_CHECKING:
    from .run import Workshop


def band_name(sigma: float, bands: int) -> str:
    """The band of equal width of (0, 1] that a noise level lies in, such as `0.50-0.75`."""
    number = min(bands - 1, max(0, int(sigma * bands - 1e-9)))
    return f"{number / bands:.2f}-{(number + 1) / bands:.2f}"


@torch.no_grad()
def held_out_loss(workshop: Workshop) -> tuple[dict[str, float], int]:
    """Mean velocity gap by band over all processes, and the number of prompts. The student's dropout is off meanwhile."""
    bands = workshop.recipe.validation.sigma_bands
    sums: dict[str, tuple[float, int]] = {}
    workshop.learner.student.train(False)
    for batch in workshop.schedule.held_out_batches():
        [position] = workshop.starts([batch])
        for sigma, loss_B in walk(position, workshop.flow, workshop.learner.embed, OBJECTIVES["velocity"]):
            total, count = sums.get(band_name(sigma, bands), (0.0, 0))
            sums[band_name(sigma, bands)] = (total + float(loss_B.double().sum()), count + len(loss_B))
    workshop.learner.student.train(True)
    return _mean_over_ranks(workshop.ranks.gather(sums)), len(workshop.schedule.held_out)


def _mean_over_ranks(gathered: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    names = sorted({name for sums in gathered for name in sums}, reverse=True)
    totals = {name: [sums[name] for sums in gathered if name in sums] for name in names}
    return {name: sum(total for total, _ in parts) / sum(count for _, count in parts) for name, parts in totals.items()}
