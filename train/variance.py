"""The variance of the teacher's text over a run's prompts, the scale of some objectives."""

# B batch, L text tokens, D channels

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..encoder.teacher import TeacherText


@torch.no_grad()
def variance_of(texts: Iterable[TeacherText], through: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """The variance of each channel, float32 [D] on the CPU, of the rows of these texts that are the prompts' own, after `through`."""
    rows, sums, squares = 0, torch.zeros(()), torch.zeros(())
    for text in texts:
        text_BLD = through(text.text_BLD.to(device)).cpu().double()
        own = text.rows.own if text.rows else [text_BLD.shape[1]] * len(text_BLD)
        for place, count in enumerate(own):
            rows += count
            sums = sums + text_BLD[place, :count].sum(dim=0)
            squares = squares + text_BLD[place, :count].square().sum(dim=0)
    return (squares / rows - (sums / rows).square()).clamp_min(0).float()
