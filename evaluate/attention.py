"""A word's attention over the picture: the upper right block of Flux's joint attention, as in Figure 7 of arXiv:2503.19897.

Everything here is a function of tensors and strings; what listens to a model while it samples is in attention_recorder.py.
"""

# B rows of a forward pass, N pictures, A heads, Q queries, K keys, D width of a head, H W rows and columns of image tokens

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from ..encoder.prompt_length import t5_tokens
from ..students.t5.tokens import END, PAD

UNKNOWN_TOKEN, UNKNOWN_SIGN = 2, "\N{REPLACEMENT CHARACTER}"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
# Where no fused attention is to be had, torch holds the weights of as many queries as this allows: 256 MB in float32.
MOST_WEIGHTS = 2**26
# From little to much: dark blue, violet, red, orange, pale yellow.
HEAT = torch.tensor([(0.02, 0.02, 0.15), (0.35, 0.06, 0.48), (0.80, 0.21, 0.33), (0.98, 0.55, 0.10), (1.0, 0.98, 0.70)])


def word_positions(clip: Any, prompt: str, word: str) -> list[int]:
    """Places, among a prompt's T5 tokens, of every token that holds a part of the word; of every occurrence, upper or lower case.

    Raises ValueError for a CLIP without T5 and for a word that is not, as a whole word, in the prompt.
    """
    pieces, wanted = t5_pieces(clip, prompt), " ".join("".join(t5_pieces(clip, word)).split())
    positions = positions_of(pieces, wanted)
    if not positions:
        read = " ".join("".join(pieces).split())
        raise ValueError(
            f"The word {word.strip()!r} is not in the prompt.\nT5 reads the prompt as: {read!r} ({UNKNOWN_SIGN} is what it cannot read)\n"
            "What to do: give a word, or several words in a row, as the prompt has them."
        )
    return positions


def t5_pieces(clip: Any, text: str) -> list[str]:
    """What each T5 token of a text stands for, "" for tokens without text; prompt weights and the like are the tokenizer's."""
    tokens = t5_tokens(clip.tokenize(text))
    return [_piece(token, clip.tokenizer.t5xxl.inv_vocab) for token, *_ in tokens]


def _piece(token: Any, names: dict[int, str]) -> str:
    if not isinstance(token, int) or token in (PAD, END):
        return ""
    return UNKNOWN_SIGN if token == UNKNOWN_TOKEN else names[token].replace(SPACE, " ")


def positions_of(pieces: Sequence[str], word: str) -> list[int]:
    """Places of the pieces that hold a part of the word wherever it stands as a whole word in their text."""
    if not word:
        return []
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    spans = [found.span() for found in re.finditer(rf"(?<!\w){pattern}(?!\w)", "".join(pieces), re.IGNORECASE)]
    positions, start = [], 0
    for place, piece in enumerate(pieces):
        end = start + len(piece)
        begin = end - len(piece.lstrip())
        if any(max(begin, first) < min(end, last) for first, last in spans):
            positions.append(place)
        start = end
    return positions


def attention_on(query_BAQD: Tensor, key_BAKD: Tensor, positions: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """The share of each query's attention that goes to the keys at these positions, mean over heads, float32 [B, Q].

    It is attention itself, with values that are 1 there and 0 elsewhere: a fused kernel never holds the matrix, and without one only some
    queries are taken at a time. `mask` is an attention mask that broadcasts to [B, A, Q, K], or None.
    """
    value_BAKD = torch.zeros_like(key_BAKD)
    value_BAKD[:, :, list(positions), 0] = 1
    batch, heads, queries, _ = query_BAQD.shape
    at_once = max(1, MOST_WEIGHTS // (batch * heads * key_BAKD.shape[2]))
    shares = []
    for first in range(0, queries, at_once):
        some = slice(first, first + at_once)
        masked = mask if mask is None or mask.shape[-2] == 1 else mask[..., some, :]
        attended_BAQD = scaled_dot_product_attention(query_BAQD[:, :, some], key_BAKD, value_BAKD, attn_mask=masked)
        shares.append(attended_BAQD[..., 0].float().mean(dim=1))
    return torch.cat(shares, dim=1)


def from_least_to_most(map_NHW: Tensor) -> Tensor:
    """Each map stretched to 0..1; one that is the same everywhere becomes 0."""
    least_N11 = map_NHW.amin(dim=(1, 2), keepdim=True)
    span_N11 = map_NHW.amax(dim=(1, 2), keepdim=True) - least_N11
    return torch.where(span_N11 > 0, (map_NHW - least_N11) / span_N11.clamp_min(torch.finfo(map_NHW.dtype).tiny), 0.0)


def enlarged(map_NHW: Tensor, height_px: int, width_px: int) -> Tensor:
    """The maps at the size of a picture, bilinear."""
    return interpolate(map_NHW[:, None], size=(height_px, width_px), mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)


def heat_colours(map_NHW: Tensor) -> Tensor:
    """Maps of 0..1 in the colours of HEAT, [N, H, W, 3]."""
    place = map_NHW.clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp_max(len(HEAT) - 2)
    colours = HEAT.to(map_NHW)
    return torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])


def overlaid(map_NHW: Tensor, image_NHW3: Tensor | None, opacity: float) -> Tensor:
    """The maps in heat colours over pictures of the same size; without pictures the colours alone."""
    heat_NHW3 = heat_colours(map_NHW)
    return heat_NHW3 if image_NHW3 is None else torch.lerp(image_NHW3.to(heat_NHW3), heat_NHW3, opacity)


def points_inside(map_HW: Tensor, inside_HW: Tensor) -> bool:
    """The pointing game (arXiv:1608.00507): whether the place of most attention lies inside the object, a mask of the map's size."""
    return bool(inside_HW.flatten()[map_HW.argmax()])
