"""What an encoder's embeddings still know of a caption: their rank, how they vary, and what a linear map can read from their mean."""

# N captions, L text tokens, D text width, K classes

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..evaluate.embeddings import effective_rank, pooled
from ..world.captions import draw_prompt
from ..world.pictures import Scene

if TYPE_CHECKING:
    from .paint import Encode

PROBE_SEED, CAPTIONS, TRAINED_ON = 1_000_033, 900, 600
RIDGE = 10.0


@dataclass(frozen=True)
class Probe:
    """Effective ranks of mean and token embeddings, the share of variance between tokens of a caption, accuracies of linear probes."""

    pooled_rank: float
    token_rank: float
    variance_within_captions: float
    read: dict[str, float]

    def __str__(self) -> str:
        read = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.read.items())
        return (
            f"effective rank {self.pooled_rank:.1f} of means, {self.token_rank:.1f} of tokens; "
            f"{100 * self.variance_within_captions:.0f} % of the variance within captions; "
            f"a linear probe of the mean reads {read} (n = {CAPTIONS - TRAINED_ON})"
        )


def probe(encode: Encode) -> Probe:
    """Probe an encoder on captions of single things."""
    prompts = [draw_prompt(PROBE_SEED, index, "train", "single_object") for index in range(CAPTIONS)]
    captions = [caption for _, caption in prompts]
    text_NLD = torch.cat([encode(captions[start : start + 100])[0] for start in range(0, CAPTIONS, 100)]).numpy().astype(np.float64)
    mean_ND = pooled(text_NLD)
    within = (text_NLD - mean_ND[:, None]).var()
    return Probe(
        effective_rank(mean_ND),
        effective_rank(text_NLD[::10].reshape(-1, text_NLD.shape[-1])),
        float(within / (text_NLD - text_NLD.mean(axis=(0, 1))).var()),
        {name: linear_probe(mean_ND, [_labels(scene)[name] for scene, _ in prompts]) for name in _labels(prompts[0][0])},
    )


def _labels(scene: Scene) -> dict[str, str]:
    [thing] = scene.things
    return {"colour": thing.colour, "shape": thing.shape, "place": thing.place, "background": scene.background}


def linear_probe(x_ND: np.ndarray, labels: list[str]) -> float:
    """Accuracy of ridge regression to the classes, on those behind the first TRAINED_ON (Alain and Bengio 2016, arXiv:1610.01644)."""
    classes = sorted(set(labels))
    right_NK = np.array([[label == name for name in classes] for label in labels], dtype=np.float64)
    x_ND = (x_ND - x_ND[:TRAINED_ON].mean(axis=0)) / (x_ND[:TRAINED_ON].std(axis=0) + 1e-9)
    x_ND = np.concatenate([x_ND, np.ones((len(x_ND), 1))], axis=1)
    seen_ND = x_ND[:TRAINED_ON]
    map_DK = np.linalg.solve(seen_ND.T @ seen_ND + RIDGE * np.eye(seen_ND.shape[1]), seen_ND.T @ right_NK[:TRAINED_ON])
    return float(((x_ND[TRAINED_ON:] @ map_DK).argmax(axis=1) == right_NK[TRAINED_ON:].argmax(axis=1)).mean())
