"""Whether an encoder's pooled embeddings have collapsed, and their map as in Figure 6 of arXiv:2503.19897."""

# N prompts, D width of a pooled embedding

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.optional import needed

if TYPE_CHECKING:
    from PIL import Image

MAP_PX, DPI, FONT_PT = 768, 96, 16
PERPLEXITY = 30.0  # scikit-learn's default; a smaller set allows less
COLOURS = ("#1f6fb4", "#d9541e", "#2e8b57", "#8b4fa8")
MARKS = ("o", "^", "s", "D")


def checked_points(x_ND: np.ndarray, at_least: int, what: str) -> np.ndarray:
    """The embeddings as float64. Raises ValueError unless they are finite, [N, D], and enough."""
    x = np.asarray(x_ND, dtype=np.float64)
    if x.ndim != 2 or len(x) < at_least or not x.shape[1]:
        raise ValueError(
            f"{what} needs at least {at_least} embeddings, [N, D]: got {list(x.shape)}.\nWhat to do: give {at_least} prompts or more."
        )
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x).all(axis=1)).sum())
        raise ValueError(
            f"{what} needs finite embeddings: {bad} of {len(x)} have NaN or infinity.\n"
            "What to do: check that the encoder's file is complete."
        )
    return x


def pooled(text_NLD: np.ndarray, mask_NL: np.ndarray | None = None) -> np.ndarray:
    """The mean embedding [N, D] of each prompt's tokens; with a mask, of those where it is true, at least one of each prompt."""
    if mask_NL is None:
        return text_NLD.mean(axis=1)
    weights_NL1 = np.asarray(mask_NL, dtype=text_NLD.dtype)[..., None]
    return (text_NLD * weights_NL1).sum(axis=1) / weights_NL1.sum(axis=1)


def pooled_distance(x_ND: np.ndarray) -> float:
    """The mean Euclidean distance over all pairs. Raises ValueError for fewer than two embeddings."""
    x = checked_points(x_ND, 2, "A mean distance")
    return float(np.mean([np.linalg.norm(x[i + 1 :] - x[i], axis=1).sum() for i in range(len(x) - 1)]) * 2 / len(x))


def effective_rank(x_ND: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares, of the embeddings about their mean (Roy and Vetterli 2007).

    1 if all are on one line, D if they fill all directions equally, 0 if they are all equal. Raises ValueError for fewer than two.
    """
    x = checked_points(x_ND, 2, "An effective rank")
    singular = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    total, rounding = singular.sum(), np.finfo(np.float64).eps * max(x.shape) * np.linalg.norm(x)
    if total <= rounding:
        return 0.0
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def tsne(x_ND: np.ndarray, seed: int = 0) -> np.ndarray:
    """The embeddings' t-SNE map [N, 2] by scikit-learn, the same for the same seed (van der Maaten and Hinton 2008).

    Raises ValueError for fewer than three embeddings, or without scikit-learn.
    """
    x = checked_points(x_ND, 3, "A t-SNE map")
    manifold = needed("sklearn.manifold", "scikit-learn", "A t-SNE map")
    perplexity = min(PERPLEXITY, (len(x) - 1) / 3)
    fit = manifold.TSNE(n_components=2, perplexity=perplexity, init="random", random_state=seed, n_jobs=1)
    return fit.fit_transform(x.astype(np.float32)).astype(np.float64)


def joint_tsne(embeddings: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """One t-SNE map of several encoders' embeddings, each [N, D]: their points by name. Raises ValueError if D differs."""
    widths = {name: np.shape(x_ND)[-1] for name, x_ND in embeddings.items()}
    if len(set(widths.values())) != 1:
        given = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(
            f"Encoders on one map must have the same text width: got {given or 'none'}.\n"
            "What to do: connect encoders for the same diffusion model, or one of them alone."
        )
    starts = np.cumsum([len(x_ND) for x_ND in embeddings.values()])[:-1]
    return dict(zip(embeddings, np.split(tsne(np.concatenate(list(embeddings.values())), seed), starts), strict=True))


def map_image(points: Mapping[str, np.ndarray], title: str = "") -> Image.Image:
    """An image of encoders' points by name, each [N, 2], on one plot; lines join the points of the same prompt.

    Raises ValueError for no or too many encoders, or without matplotlib.
    """
    from PIL import Image

    if not 1 <= len(points) <= len(COLOURS):
        raise ValueError(f"A map shows 1 to {len(COLOURS)} encoders: got {len(points)}.\nWhat to do: leave some out.")
    figures = needed("matplotlib.figure", "matplotlib", "A map of embeddings")
    canvases = needed("matplotlib.backends.backend_agg", "matplotlib", "A map of embeddings")
    figure = figures.Figure(figsize=(MAP_PX / DPI, MAP_PX / DPI), dpi=DPI, layout="constrained")
    canvas, axes = canvases.FigureCanvasAgg(figure), figure.add_subplot()
    if len({len(points_N2) for points_N2 in points.values()}) == 1:
        for same_K2 in zip(*points.values(), strict=True):
            axes.plot(*np.transpose(same_K2), color="#8a8f9c", linewidth=1.2, zorder=1)
    for (name, points_N2), colour, mark in zip(points.items(), COLOURS, MARKS, strict=False):
        label = f"{name} (n = {len(points_N2)})".replace("$", r"\$")
        axes.scatter(points_N2[:, 0], points_N2[:, 1], s=64, c=colour, marker=mark, alpha=0.7, linewidths=0, label=label)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title.replace("$", r"\$"), fontsize=FONT_PT)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=FONT_PT)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
