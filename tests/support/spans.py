"""The inverse of the teacher's pretraining task."""

from __future__ import annotations

from collections.abc import Sequence

from ...miniature.corruption import FIRST_SENTINEL, SENTINELS


def restore(inputs: Sequence[int], targets: Sequence[int]) -> list[int]:
    """The text, without its end token, of which `corrupt` made these."""
    hidden: dict[int, list[int]] = {}
    span: list[int] = []
    for token in targets[:-1]:
        if FIRST_SENTINEL - SENTINELS < token <= FIRST_SENTINEL:
            span = hidden.setdefault(token, [])
        else:
            span.append(token)
    return [token for kept in inputs[:-1] for token in hidden.get(kept, [kept])]
