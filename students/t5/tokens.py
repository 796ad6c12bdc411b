"""Token ids of T5 at one length."""

from __future__ import annotations

END, PAD = 1, 0


def fit(token_ids: list[int], length: int) -> list[int]:
    """Token ids cut or padded to exactly `length`; what is cut still ends with the end token."""
    if len(token_ids) > length:
        return [*token_ids[: length - 1], END]
    return token_ids + [PAD] * (length - len(token_ids))
