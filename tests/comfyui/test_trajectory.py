"""Steps along trajectories without a network: by hand, drawn from a seed, in bands of noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from distilled_t5.families import FAMILIES
from distilled_t5.train.objectives import OBJECTIVES, Gap, velocity_gap
from distilled_t5.train.trajectory import Position, advance, band_name, draw, gaps_at, gaps_by_band
from torch import Tensor

SHAPE = FAMILIES["flux"].latent_shape(64)


class LinearFlow:
    """Velocity that is linear in the text: simple enough to differentiate by hand."""

    def __init__(self, matrix_DC: Tensor) -> None:
        self.matrix_DC = matrix_DC

    def velocity(self, x: Tensor, sigma_B: Tensor, text_BLD: Tensor, extras: Mapping[str, Any], guidance_B: Tensor | None = None) -> Tensor:
        assert guidance_B is not None
        push_BC = text_BLD.mean(1) @ self.matrix_DC * guidance_B[:, None]
        return sigma_B.view(-1, 1, 1, 1) * x + push_BC[:, :, None, None]


def test_one_step_equals_a_reference_written_by_hand_in_float64():
    generator = torch.Generator().manual_seed(3)
    matrix, student_text, teacher_text = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(6, 16), (2, 5, 6), (2, 5, 6)]
    )
    x = torch.randn(2, 16, 4, 4, generator=generator, dtype=torch.float64)
    guidance, sigmas = torch.tensor([2.0, 5.0], dtype=torch.float64), torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64)
    place = Position(0, x, sigmas, teacher_text, {}, guidance, torch.zeros(2, 5, dtype=torch.long))
    leaf = student_text.clone().requires_grad_(True)
    [loss_B], velocity = gaps_at(place, LinearFlow(matrix), [lambda _ids: leaf], OBJECTIVES["velocity"])
    loss_B.mean().backward()

    gap_BC = (student_text - teacher_text).mean(1) @ matrix * guidance[:, None]
    expected_loss_B = gap_BC.square().mean(1)
    # d/d text of mean over B of mean over C of (guidance * mean over L of text @ matrix)^2
    expected_gradient = (2 * gap_BC / 16 * guidance[:, None] / 2) @ matrix.T / 5
    torch.testing.assert_close(loss_B.double(), expected_loss_B, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(leaf.grad, expected_gradient[:, None].expand(2, 5, 6), atol=1e-6, rtol=1e-6)
    teacher_velocity = x + (teacher_text.mean(1) @ matrix * guidance[:, None])[:, :, None, None]
    torch.testing.assert_close(advance(place, velocity).x, x - 0.75 * teacher_velocity)


def test_draws_are_a_pure_function_of_seed_and_index():
    first, again, other = (draw(7, index, 8, SHAPE, (2.0, 5.0), (77, 128)) for index in (3, 3, 4))
    assert torch.equal(first.noise, again.noise)
    assert first.guidance_B is not None and again.guidance_B is not None
    assert torch.equal(first.guidance_B, again.guidance_B)
    assert not torch.equal(first.noise, other.noise)
    seeds = [draw(seed, 3, 8, SHAPE, (2.0, 3.0, 4.0, 5.0), (77, 128)) for seed in range(4)]
    assert len({float(drawn.noise.sum()) for drawn in seeds}) == 4
    assert len({str(drawn.guidance_B) for drawn in seeds}) > 1
    lengths = {draw(7, index, 1, SHAPE, (2.0,), (77, 128)).token_length for index in range(20)}
    assert lengths == {77, 128}
    assert draw(7, 0, 1, SHAPE, (), (77,)).guidance_B is None


def test_losses_are_means_over_all_dimensions_but_the_batch():
    student, teacher = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    gap = Gap(torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), student, teacher)
    torch.testing.assert_close(velocity_gap(gap), (student - teacher).square().flatten(1).mean(1))


class Still:
    """A model whose velocity is zero."""

    def velocity(self, x: Tensor, sigma_B: Tensor, text_BLD: Tensor, extras: Mapping[str, Any], guidance_B: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("sigmas", "bands"),
    [([1.0, 0.6, 0.2, 0.0], ["0.50-1.00", "0.50-1.00", "0.00-0.50"]), ([80.0, 1.2, 0.5, 0.0], ["0.50-1.00", "0.50-1.00", "0.00-0.50"])],
)
def test_bands_are_of_noise_levels_or_of_the_share_of_noise_where_levels_go_beyond_one(sigmas, bands):
    place = Position(0, torch.zeros(1, 2, 2, 2), torch.tensor(sigmas), torch.zeros(1, 3, 4), {}, None, torch.zeros(1, 3))
    assert [band for band, _ in gaps_by_band(place, Still(), [lambda ids: torch.zeros(1, 3, 4)], 2)] == bands
    assert band_name(0.5, 2) == "0.00-0.50"
