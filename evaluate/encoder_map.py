"""One map of the pooled embeddings of one or two encoders (Figure 6 of arXiv:2503.19897), and whether they collapsed."""

# N prompts, L tokens, D width of an embedding

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..encoder.conditioning import encoded
from ..encoder.prompt_length import own_tokens, tokenized
from .embeddings import effective_rank, joint_tsne, map_image, pooled, pooled_distance

if TYPE_CHECKING:
    from PIL import Image

LEAST_PROMPTS = 5
# scikit-learn accepts no larger seed.
SEEDS = 2**32


def prompts_of(text: str) -> list[str]:
    """The distinct prompts of a text, one per line. Raises ValueError if they are too few for a map."""
    prompts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(prompts) < LEAST_PROMPTS:
        raise ValueError(
            f"A map needs at least {LEAST_PROMPTS} different prompts, one on each line: got {len(prompts)}.\n"
            "What to do: write more prompts; a few hundred make a good map."
        )
    return prompts


def pooled_prompts(clip: Any, prompts: Sequence[str], progress: Callable[[int], None]) -> np.ndarray:
    """The mean embedding [N, D] of each prompt's T5 tokens without padding, by a CLIP of ComfyUI; `progress(done)` may raise to cancel."""
    found = []
    for done, prompt in enumerate(prompts):
        progress(done)
        tokens = tokenized(clip, prompt)
        own_1L = np.array([own_tokens(clip, tokens)])
        text_1LD = encoded(clip, tokens)[0][0].float().cpu().numpy()
        found.append(pooled(text_1LD, own_1L)[0])
    progress(len(prompts))
    return np.stack(found)


def joint_map(embeddings: Mapping[str, np.ndarray], seed: int = 0) -> tuple[Image.Image, str]:
    """All encoders' points on one map, and how far each has collapsed. Raises ValueError if their widths differ."""
    image = map_image(joint_tsne(embeddings, seed % SEEDS), "t-SNE of pooled prompts")
    return image, "\n".join(f"{name}: {collapse(each)}" for name, each in embeddings.items())


def collapse(x_ND: np.ndarray) -> str:
    """Mean distance and effective rank of an encoder's embeddings, with their number."""
    return f"mean distance {pooled_distance(x_ND):.4g}, effective rank {effective_rank(x_ND):.1f}, of {len(x_ND)} prompts"
