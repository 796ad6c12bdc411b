"""The rows of the texts of a batch, where prompts have different numbers of them or where not all of them are the encoder's."""

# B batch, G some prompts of it, K rows of the companions, L text tokens, D text width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.grouping import alike


@dataclass(frozen=True)
class Rows:
    """How many rows of the large encoder, or of a student, are each prompt's own, and the rows [K, D] of the companions before them."""

    own: tuple[int, ...]
    before: tuple[Tensor, ...]

    @property
    def groups(self) -> list[list[int]]:
        """The prompts whose texts have the same number of rows."""
        return alike((own, len(before)) for own, before in zip(self.own, self.before, strict=True))

    def text(self, text_BLD: Tensor, group: Sequence[int]) -> Tensor:
        """The texts [G, K + L, D] of a group, of the encoder's rows [B, L, D] of all prompts."""
        rows_GLD = text_BLD[list(group), : self.own[group[0]]]
        return torch.cat([torch.stack([self.before[place] for place in group]).to(rows_GLD), rows_GLD], dim=1)

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(self.own, tuple(before.to(device) for before in self.before))
