"""Collapse of embeddings: distances and ranks by hand, t-SNE and the map on points whose groups are known."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from distilled_t5.evaluate.embeddings import COLOURS, MAP_PX, effective_rank, joint_tsne, map_image, pooled, pooled_distance, tsne
from scipy.spatial.distance import pdist


def test_the_mean_distance_of_a_triangle_is_that_of_its_sides():
    assert pooled_distance(np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])) == pytest.approx((3 + 4 + 5) / 3)
    assert pooled_distance(np.zeros((5, 3))) == 0


def test_the_mean_distance_is_scipys():
    x = np.random.default_rng(0).normal(size=(37, 11))
    assert pooled_distance(x) == pytest.approx(pdist(x).mean())
    assert pooled_distance(x.astype(np.float32)) == pytest.approx(pdist(x).mean(), rel=1e-5)


def cross(*lengths: float) -> np.ndarray:
    """Points at both ends of axes of these lengths: their mean is 0, and the singular values are sqrt(2) times the lengths."""
    return np.concatenate([np.diag(lengths), -np.diag(lengths)])


def test_the_effective_rank_by_hand():
    assert effective_rank(cross(1, 1, 1, 1)) == pytest.approx(4)
    assert effective_rank(cross(1, 0, 0)) == pytest.approx(1)
    shares = (0.5, 0.25, 0.25)  # the entropy is 1.5 ln 2
    assert effective_rank(cross(*shares)) == pytest.approx(2**1.5)
    assert effective_rank(cross(*shares) + 100) == pytest.approx(2**1.5), "a common offset does not add a dimension"
    assert effective_rank(1e-6 * cross(*shares)) == pytest.approx(2**1.5), "the scale does not matter"


def test_the_rank_of_one_point_many_times_is_zero():
    assert effective_rank(np.full((6, 4), 0.1)) == 0
    assert effective_rank(np.zeros((6, 4))) == 0


def test_pooled_is_the_mean_of_the_tokens_that_the_mask_keeps():
    text = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert pooled(text).tolist() == [[2, 3], [8, 9]]
    assert pooled(text, np.array([[True, False, False], [True, True, False]])).tolist() == [[0, 1], [7, 8]]


def two_groups() -> np.ndarray:
    noise = np.random.default_rng(1).normal(size=(40, 16))
    noise[20:, 0] += 60
    return noise


def test_tsne_keeps_groups_apart_and_depends_on_the_seed_alone():
    points = tsne(two_groups(), seed=3)
    assert points.shape == (40, 2)
    near, far = points[:20], points[20:]
    gap = np.linalg.norm(near[:, None] - far[None], axis=-1).min()
    assert gap > max(np.linalg.norm(near - near.mean(0), axis=1).max(), np.linalg.norm(far - far.mean(0), axis=1).max())
    assert np.array_equal(points, tsne(two_groups(), seed=3))
    assert not np.array_equal(points, tsne(two_groups(), seed=4))


def test_two_encoders_are_laid_out_together():
    x = two_groups()
    found = joint_tsne({"teacher": x[:25], "student": x[25:]}, seed=3)
    assert np.array_equal(np.concatenate([found["teacher"], found["student"]]), tsne(x, seed=3))
    with pytest.raises(ValueError, match="same text width"):
        joint_tsne({"teacher": x, "student": x[:, :3]})


def count_of(picture, colour: str) -> int:
    """Pixels nearest to a colour of the plot, which are drawn a little transparent on white."""
    pixels = np.asarray(picture, dtype=float)
    blended = 0.7 * np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) + 0.3 * 255
    return int((np.abs(pixels - blended).max(axis=-1) < 8).sum())


def test_the_map_shows_the_points_of_each_encoder_in_its_colour_and_touches_no_global_state():
    pyplot_before = "matplotlib.pyplot" in sys.modules
    corners = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    one, two = map_image({"teacher": corners}), map_image({"teacher": corners, "a $student": corners + 0.3}, "Costs $5 and $6")
    assert one.size == two.size == (MAP_PX, MAP_PX)
    assert one.mode == "RGB"
    assert count_of(one, COLOURS[0]) > 4 * 15
    assert count_of(one, COLOURS[1]) == 0
    assert count_of(two, COLOURS[1]) > 4 * 15
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before
    with pytest.raises(ValueError, match="1 to 4 encoders: got 0"):
        map_image({})


@pytest.mark.parametrize("metric", [pooled_distance, effective_rank, tsne])
def test_embeddings_that_are_too_few_misshapen_or_not_finite_are_refused(metric):
    for bad in (np.zeros((1, 4)), np.zeros(4), np.zeros((2, 3, 4))):
        with pytest.raises(ValueError, match=r"needs at least \d embeddings(.|\n)*What to do"):
            metric(bad)
    broken = np.ones((5, 4))
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 5 have NaN"):
        metric(broken)
