"""A word's attention over the image: of joint attention the upper right block, as in Figure 7 of arXiv:2503.19897, or cross-attention.

Pure functions of tensors and strings; attention_recorder.py follows a model while it samples.
"""

# B rows of a forward pass, N images, A heads, Q queries, K keys, D width of a head, H W rows and columns of image tokens

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

from ..encoder.prompt_length import encoder_tokens, family_of, tokenized
from ..students.kind import StudentKind

UNKNOWN_TOKEN, UNKNOWN_SIGN = 2, "\N{REPLACEMENT CHARACTER}"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
# Without fused attention torch holds the weights of as many queries as this allows: 256 MB in float32.
MOST_WEIGHTS = 2**26
# From low to high: dark blue, violet, red, orange, pale yellow.
HEAT = torch.tensor([(0.02, 0.02, 0.15), (0.35, 0.06, 0.48), (0.80, 0.21, 0.33), (0.98, 0.55, 0.10), (1.0, 0.98, 0.70)])


def word_positions(clip: Any, prompt: str, word: str) -> list[int]:
    """Positions, among a prompt's T5 tokens, of every token with a part of the word, at every occurrence, in any case.

    Raises ValueError for a CLIP without T5 and for a word that is not in the prompt as a word of its own.
    """
    pieces, wanted = t5_pieces(clip, prompt), " ".join("".join(t5_pieces(clip, word)).split())
    positions = positions_of(pieces, wanted)
    if not positions:
        read = " ".join("".join(pieces).split())
        raise ValueError(
            f"The word {word.strip()!r} is not in the prompt.\nT5 reads the prompt as: {read!r} ({UNKNOWN_SIGN}: not in its vocabulary)\n"
            "What to do: give a word, or several consecutive words, as they are in the prompt."
        )
    return positions


def t5_pieces(clip: Any, text: str) -> list[str]:
    """The text of each T5 token, "" for tokens without text; the tokenizer reads prompt weights and the like."""
    tokens = tokenized(clip, text)
    family = family_of(clip, tokens)
    return [_piece(token, family.tokenizer(clip).inv_vocab, family.kind) for token, *_ in encoder_tokens(clip, tokens)]


def _piece(token: Any, names: dict[int, str], kind: StudentKind) -> str:
    if not isinstance(token, int) or token in (kind.pad, kind.end):
        return ""
    return UNKNOWN_SIGN if token == UNKNOWN_TOKEN else names[token].replace(SPACE, " ")


def positions_of(pieces: Sequence[str], word: str) -> list[int]:
    """Positions of the pieces with a part of the word, wherever it is a word of its own in their text."""
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

    Computed as attention over values that are 1 there and 0 elsewhere: a fused kernel never holds the matrix, and without one the queries
    are split. `mask` is an attention mask that broadcasts to [B, A, Q, K], or None.
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


def stretched(map_NHW: Tensor) -> Tensor:
    """Each map stretched to 0..1; a constant map becomes 0."""
    least_N11 = map_NHW.amin(dim=(1, 2), keepdim=True)
    span_N11 = map_NHW.amax(dim=(1, 2), keepdim=True) - least_N11
    return torch.where(span_N11 > 0, (map_NHW - least_N11) / span_N11.clamp_min(torch.finfo(map_NHW.dtype).tiny), 0.0)


def enlarged(map_NHW: Tensor, height_px: int, width_px: int) -> Tensor:
    """The maps enlarged to the size of an image, bilinear."""
    return interpolate(map_NHW[:, None], size=(height_px, width_px), mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)


def heat_colours(map_NHW: Tensor) -> Tensor:
    """Maps of 0..1 in the colours of HEAT, [N, H, W, 3]."""
    place = map_NHW.clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp_max(len(HEAT) - 2)
    colours = HEAT.to(map_NHW)
    return torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])


def overlaid(map_NHW: Tensor, image_NHW3: Tensor | None, opacity: float) -> Tensor:
    """The maps in heat colours over images of the same size, or the colours alone."""
    heat_NHW3 = heat_colours(map_NHW)
    return heat_NHW3 if image_NHW3 is None else torch.lerp(image_NHW3.to(heat_NHW3), heat_NHW3, opacity)
