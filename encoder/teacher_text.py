"""A teacher's text embeddings and pooled vectors of prompts, and where a run gets them."""

# B batch, K rows of the companions, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .rows import Rows


@dataclass(frozen=True)
class TeacherText:
    """The teacher's encoding of a batch of prompts, on the CPU: token ids [B, L], embeddings [B, L, D], pooled vectors [B, P].

    rows: what of them is the text of each prompt, where it is not all of it. empty: the same of the empty prompt, for CFG.
    """

    token_ids_BL: Tensor
    text_BLD: Tensor
    pooled_BP: Tensor
    rows: Rows | None = None
    empty: TeacherText | None = None

    def extras(self, device: torch.device) -> dict[str, Any]:
        """What stands beside the text in a conditioning entry, on a device."""
        return {"pooled_output": self.pooled_BP.to(device) if self.pooled_BP.shape[-1] else None}

    @property
    def whole(self) -> Tensor:
        """The text [1, K + L, D] of a single prompt, with the companions' rows."""
        return self.text_BLD if self.rows is None else self.rows.text(self.text_BLD, [0])


class TextSource(Protocol):
    """Where a run has its teacher's texts from: a `Teacher`, or a cache of what one has encoded."""

    def encode(self, prompts: Sequence[str], length: int, with_empty: bool = False) -> TeacherText:
        """The texts of some prompts at one token length, and that of the empty prompt."""
        ...
