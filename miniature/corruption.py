"""T5's own pretraining task: spans of the text are replaced by sentinels, and the model says what stood there.

Span corruption as in Raffel et al. 2020 (arXiv:1910.10683, 3.1.4): 15 % of the tokens, spans of three tokens on average.
"""

# L tokens

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..students.t5.tokens import END

NOISE_SHARE, MEAN_SPAN = 0.15, 3.0
# The tokenizer's <extra_id_0>; <extra_id_1> is the number below it, and so on.
FIRST_SENTINEL, SENTINELS = 32099, 100


def load_tokenizer(comfyui: Path) -> Any:
    """T5's tokenizer, which lies inside ComfyUI."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined] (made on the spot by transformers 5)

    return T5TokenizerFast.from_pretrained(str(comfyui / "comfy" / "text_encoders" / "t5_tokenizer"))


def noise_spans(length: int, random: np.random.RandomState) -> list[tuple[int, int]]:
    """The spans (first token, end) to be hidden in a text of `length` tokens, at least two; no two of them touch.

    What is kept before the first and after the last span may be empty: a short text has one span alone, which must not always be its end.
    """
    assert length >= 2, "a text of one token has nothing beside what is hidden"
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
    """`total` cut into `count` parts of at least one, every way as likely."""
    cuts = sorted(random.permutation(total - 1)[: count - 1] + 1)
    return [int(size) for size in np.diff([0, *cuts, total])]


def corrupt(tokens: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Inputs and targets for a text (without its end token): each span gives way to a sentinel, which the target sets before it.

    Both end with the end token.
    """
    inputs, targets, at = [], [], 0
    for number, (first, end) in enumerate(spans):
        inputs += [*tokens[at:first], FIRST_SENTINEL - number]
        targets += [FIRST_SENTINEL - number, *tokens[first:end]]
        at = end
    return [*inputs, *tokens[at:], END], [*targets, END]


def restore(inputs: Sequence[int], targets: Sequence[int]) -> list[int]:
    """The text that `corrupt` took apart, without its end token."""
    hidden: dict[int, list[int]] = {}
    sentinel = None
    for token in targets[:-1]:
        if _is_sentinel(token):
            sentinel = hidden.setdefault(token, [])
        else:
            assert sentinel is not None, "targets begin with a sentinel"
            sentinel.append(token)
    return [token for kept in inputs[:-1] for token in (hidden[kept] if _is_sentinel(kept) else [kept])]


def _is_sentinel(token: int) -> bool:
    return FIRST_SENTINEL - SENTINELS < token <= FIRST_SENTINEL
