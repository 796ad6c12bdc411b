"""Which tokens of a prompt the encoder sees, and how many, compared with the length at which it was trained."""

from __future__ import annotations

import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..families import FAMILIES
from ..families.family import Family

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


def seen_by_encoder(pairs: Sequence[TokenWeight], pad: int, vector_width: int | None = None) -> list[TokenWeight]:
    """Tokens as the encoder sees them: without textual-inversion vectors of another width, and padded to the same length at the end.

    This is what ComfyUI does. A student takes no vectors at all (None): those for CLIP-L are as wide as T5-Base.
    """
    kept = [pair for pair in pairs if isinstance(pair[0], numbers.Integral) or _width(pair[0]) == vector_width]
    return kept + [(pad, 1.0)] * (len(pairs) - len(kept))


def _width(vector: Any) -> int:
    return vector.shape[-1] if hasattr(vector, "shape") else 0


def family_of(clip: Any, tokens: Iterable[str]) -> Family:
    """A family whose large encoder, or a student in its place, reads the tokens of this CLIP. Raises ValueError if there is none."""
    # The tokens of an SD3 CLIP without T5 are there all the same.
    parts = [name for name in tokens if getattr(clip.cond_stage_model, name, True) is not None]
    found = next((family for family in FAMILIES.values() if family.part in parts and family.tokenizer(clip) is not None), None)
    if found is None:
        encoders = " or ".join(dict.fromkeys(family.kind.display_name for family in FAMILIES.values()))
        names = " or ".join(family.display_name for family in FAMILIES.values())
        raise ValueError(
            f"This CLIP has no {encoders} (its tokens are for {', '.join(parts)}).\n"
            f"What to do: connect a Distilled Text Encoder Loader, or another CLIP for {names}."
        )
    return found


def encoder_tokens(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> list[tuple]:
    """The tokens with their weights that a student, or the large encoder, of a CLIP sees, padding included.

    Raises ValueError for a CLIP with neither.
    """
    family = family_of(clip, tokens)
    model, vector_width = clip.cond_stage_model, None
    if not hasattr(model, "metadata"):
        vector_width = getattr(model, family.part).transformer.get_input_embeddings().weight.shape[-1]
    return [token for chunk in tokens[family.part] for token in seen_by_encoder(chunk, family.kind.pad, vector_width)]


def own_tokens(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> list[bool]:
    """Whether each of the encoder's tokens belongs to the prompt, as the end token does, or is padding."""
    pad = family_of(clip, tokens).kind.pad
    return [not (isinstance(token, numbers.Integral) and token == pad) for token, *_ in encoder_tokens(clip, tokens)]


def describe_length(clip: Any, tokens: Mapping[str, Sequence[Sequence[tuple]]]) -> str:
    """One line about a tokenized prompt. Raises ValueError for a CLIP with neither a student nor a large encoder."""
    count, kind = sum(own_tokens(clip, tokens)), family_of(clip, tokens).kind.display_name
    metadata = getattr(clip.cond_stage_model, "metadata", None)
    if metadata is None or not FAMILIES[metadata.family].padded:
        return f"{count} {kind} tokens"
    trained = metadata.token_length
    if count <= trained:
        return f"{count} of {trained} {kind} tokens"
    excess = f"{count - trained} more than the {trained} at which this encoder was trained"
    return f"{count} {kind} tokens, {excess}: the end of the prompt will have little effect"
