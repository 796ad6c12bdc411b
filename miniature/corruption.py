"""T5's pretraining task: sentinels replace spans of the text, and the model predicts the hidden tokens.

Span corruption as in Raffel et al. 2020 (arXiv:1910.10683, 3.1.4): 15 % of the tokens, spans of three tokens on average.
"""

# L tokens

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..students.t5 import T5

NOISE_SHARE, MEAN_SPAN = 0.15, 3.0
# The tokenizer's <extra_id_0>; <extra_id_1> is the number below it, and so on.
FIRST_SENTINEL, SENTINELS = 32099, 100


def load_tokenizer(comfyui: Path) -> Any:
    """T5's tokenizer, from ComfyUI's own files."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined] (transformers 5 defines it at run time)

    return T5TokenizerFast.from_pretrained(str(comfyui / "comfy" / "text_encoders" / "t5_tokenizer"))


def noise_spans(length: int, random: np.random.RandomState) -> list[tuple[int, int]]:
    """The spans (first token, end) to hide in a text of `length` tokens, at least two. No two spans touch.

    A text may start or end with a span: a short text has only one span, which must not always be at its end.
    """
    assert length >= 2, "expected at least two tokens, one of which stays visible"
    hidden = max(round(length * NOISE_SHARE), 1)
    count = min(max(round(hidden / MEAN_SPAN), 1), SENTINELS)
    kept_parts, hidden_parts = _parts(length - hidden + 2, count + 1, random), _parts(hidden, count, random)
    kept_parts[0] -= 1
    spans, at = [], 0
    for kept, hide in zip(kept_parts[:-1], hidden_parts, strict=True):
        spans.append((at + kept, at + kept + hide))
        at += kept + hide
    return spans


def _parts(total: int, count: int, random: np.random.RandomState) -> list[int]:
    """`total` cut into `count` parts of at least one, uniformly at random."""
    cuts = sorted(random.permutation(total - 1)[: count - 1] + 1)
    return [int(size) for size in np.diff([0, *cuts, total])]


def corrupt(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Inputs and targets for a text without its end token: a sentinel replaces each span and precedes it in the targets.

    Both get an end token.
    """
    inputs, targets, at = [], [], 0
    for number, (first, end) in enumerate(spans):
        inputs += [*tokens[at:first], FIRST_SENTINEL - number]
        targets += [FIRST_SENTINEL - number, *tokens[first:end]]
        at = end
    return [*inputs, *tokens[at:], T5.end], [*targets, T5.end]
