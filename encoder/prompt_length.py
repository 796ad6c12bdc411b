"""Which tokens of a prompt the encoder sees, and how many, compared with the length at which it was trained."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..families import FAMILIES
from ..students.t5.tokens import PAD

TokenWeight = tuple[Any, float]
NOT_UNICODE = re.compile("[\ud800-\udfff]")


def tokenized(clip: Any, text: str) -> Any:
    """The tokens of a prompt. Raises ValueError for text that is not valid Unicode, which tokenizers refuse without saying why."""
    if broken := NOT_UNICODE.search(text):
        raise ValueError(
            f"The text is not valid Unicode: it holds {broken[0]!r}, half of a character such as an emoji.\n"
            "What to do: delete that character and type it again."
        )
    return clip.tokenize(text)


def seen_by_t5(pairs: Sequence[TokenWeight], vector_width: int | None = None) -> list[TokenWeight]:
    """Tokens as the encoder sees them: without textual-inversion vectors of another width, and padded to the same length at the end.

    This is what ComfyUI does. A student takes no vectors at all (None): those for CLIP-L are as wide as T5-Base.
    """
    kept = [pair for pair in pairs if isinstance(pair[0], numbers.Integral) or _width(pair[0]) == vector_width]
    return kept + [(PAD, 1.0)] * (len(pairs) - len(kept))


def _width(vector: Any) -> int:
    return vector.shape[-1] if hasattr(vector, "shape") else 0


def t5_tokens(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> list[tuple]:
    """The tokens with their weights that the T5 of a CLIP sees, padding included. Raises ValueError for a CLIP without T5."""
    part = next((family.part for family in FAMILIES.values() if family.part in tokens), None)
    if part is None:
        names = " or ".join(family.display_name for family in FAMILIES.values())
        raise ValueError(
            f"This CLIP has no T5 (its tokens are for {', '.join(tokens)}).\n"
            f"What to do: connect a Distilled T5 Loader, or another CLIP for {names}."
        )
    model, vector_width = clip.cond_stage_model, None
    if not hasattr(model, "metadata"):
        vector_width = getattr(model, part).transformer.get_input_embeddings().weight.shape[-1]
    return [token for chunk in tokens[part] for token in seen_by_t5(chunk, vector_width)]


def is_padding(token: tuple) -> bool:
    """Whether a token with its weight is padding. The end token is part of the prompt."""
    return isinstance(token[0], numbers.Integral) and token[0] == PAD


def describe_length(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> str:
    """One line about a tokenized prompt. Raises ValueError for a CLIP without T5."""
    count = sum(not is_padding(token) for token in t5_tokens(clip, tokens))
    metadata = getattr(clip.cond_stage_model, "metadata", None)
    if metadata is None:
        return f"{count} T5 tokens"
    trained = metadata.token_length
    if count <= trained:
        return f"{count} of {trained} T5 tokens"
    excess = f"{count - trained} more than the {trained} at which this encoder was trained"
    return f"{count} T5 tokens, {excess}: the end of the prompt will have little effect"
