"""How long a prompt is, against the length at which its encoder was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The end token is part of the prompt, padding is not.
PAD = 0


def t5_tokens(tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> list[tuple]:
    """The T5's tokens with their weights, padding included. Raises ValueError for those of a CLIP that has no T5."""
    if "t5xxl" not in tokens:
        raise ValueError(
            f"This CLIP has no T5 (its tokens are for {', '.join(tokens)}).\n"
            "What to do: connect a Distilled T5 Loader, or another CLIP for Flux."
        )
    return [token for chunk in tokens["t5xxl"] for token in chunk]


def is_padding(token: tuple) -> bool:
    """Whether a token with its weight is one of those that fill a prompt up."""
    return isinstance(token[0], int) and token[0] == PAD


def describe_length(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> str:
    """One line about a tokenized prompt. Raises ValueError for a CLIP that has no T5."""
    count = sum(not is_padding(token) for token in t5_tokens(tokens))
    metadata = getattr(clip.cond_stage_model, "metadata", None)
    if metadata is None:
        return f"{count} T5 tokens"
    trained = metadata.token_length
    if count <= trained:
        return f"{count} of {trained} T5 tokens"
    excess = f"{count - trained} more than the {trained} this encoder was trained at"
    return f"{count} T5 tokens, {excess}: expect the end of the prompt to count for little"
