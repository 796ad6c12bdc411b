"""How long a prompt is, compared with the length at which its encoder was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..families import FAMILIES
from ..students.t5.tokens import PAD

NOT_UNICODE = re.compile("[\ud800-\udfff]")


def tokenized(clip: Any, text: str) -> Any:
    """The tokens of a prompt. Raises ValueError for text that is not valid Unicode, which tokenizers refuse without saying why."""
    if broken := NOT_UNICODE.search(text):
        raise ValueError(
            f"The text is not valid Unicode: it holds {broken[0]!r}, half of a character such as an emoji.\n"
            "What to do: delete that character and type it again."
        )
    return clip.tokenize(text)


def t5_tokens(tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> list[tuple]:
    """The T5's tokens with their weights, padding included. Raises ValueError for those of a CLIP without T5."""
    part = next((family.part for family in FAMILIES.values() if family.part in tokens), None)
    if part is None:
        names = " or ".join(family.display_name for family in FAMILIES.values())
        raise ValueError(
            f"This CLIP has no T5 (its tokens are for {', '.join(tokens)}).\n"
            f"What to do: connect a Distilled T5 Loader, or another CLIP for {names}."
        )
    return [token for chunk in tokens[part] for token in chunk]


def is_padding(token: tuple) -> bool:
    """Whether a token with its weight is padding. The end token is part of the prompt."""
    return isinstance(token[0], int) and token[0] == PAD


def describe_length(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> str:
    """One line about a tokenized prompt. Raises ValueError for a CLIP without T5."""
    count = sum(not is_padding(token) for token in t5_tokens(tokens))
    metadata = getattr(clip.cond_stage_model, "metadata", None)
    if metadata is None:
        return f"{count} T5 tokens"
    trained = metadata.token_length
    if count <= trained:
        return f"{count} of {trained} T5 tokens"
    excess = f"{count - trained} more than the {trained} at which this encoder was trained"
    return f"{count} T5 tokens, {excess}: the end of the prompt will have little effect"
