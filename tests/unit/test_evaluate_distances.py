"""Same-seed distances: latents and velocities by hand, LPIPS against its formula written out."""

from __future__ import annotations

from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from distilled_t5.evaluate.distances import Lpips, latent_rms, velocity_gaps
from distilled_t5.tests.support.tiny_judges import CONVOLUTIONS, save_alexnet
from distilled_t5.train.trajectory import Position
from safetensors.torch import load_file, save_file
from torch import nn


def test_latent_rms_by_hand():
    start = torch.zeros(2, 1, 2, 2)
    moved = start.clone()
    moved[1] = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])  # a mean square of 25 / 4
    found = latent_rms([start, start], [start, moved])
    assert found.tolist() == [[0, 0], [0, 2.5]]


def test_runs_of_other_lengths_or_sizes_are_refused():
    latent = torch.zeros(1, 1, 2, 2)
    for teacher, student in (([latent], [latent, latent]), ([latent], [torch.zeros(1, 1, 2, 3)]), ([], [])):
        with pytest.raises(ValueError, match=r"same steps and sizes(.|\n)*What to do"):
            latent_rms(teacher, student)


class StraightModel:
    """A velocity that is sigma times the mean of the text, everywhere."""

    def velocity(self, x, sigma_B, text_BLD, extras, guidance_B=None):
        return torch.ones_like(x) * (sigma_B * text_BLD.mean(dim=(1, 2))).view(-1, 1, 1, 1)


def at_the_start(texts: list[float]) -> Position:
    count = len(texts)
    return Position(
        step=0,
        x=torch.zeros(count, 2, 2, 2),
        sigmas_T=torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]),
        text_BLD=torch.tensor(texts, dtype=torch.float32).view(-1, 1, 1).expand(-1, 3, 4),
        extras={},
        guidance_B=None,
        token_ids_BL=torch.zeros(count, 3, dtype=torch.long),
    )


def test_the_velocity_gap_by_hand():
    """The student says 3 to each prompt and the teacher 1, 2 and 3: gaps of 4, 1 and 0 times sigma squared."""
    found = velocity_gaps(at_the_start([1, 2, 3]), StraightModel(), lambda ids: torch.full((len(ids), 3, 4), 3.0), 4)
    assert list(found) == ["0.75-1.00", "0.50-0.75", "0.25-0.50", "0.00-0.25"]
    for gaps, sigma in zip(found.values(), (1.0, 0.75, 0.5, 0.25), strict=True):
        assert gaps == pytest.approx([4 * sigma**2, sigma**2, 0])


def test_steps_of_one_band_are_averaged_by_prompt():
    [gaps] = velocity_gaps(at_the_start([1, 2]), StraightModel(), lambda ids: torch.full((len(ids), 3, 4), 3.0), bands=1).values()
    mean = (1 + 0.5625 + 0.25 + 0.0625) / 4
    assert gaps == pytest.approx([4 * mean, mean])


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    return save_alexnet(tmp_path_factory.mktemp("lpips") / "alexnet.safetensors")


def lpips_by_hand(path: Path, a: np.ndarray, b: np.ndarray) -> float:
    """The formula of arXiv:1801.03924, eq. 1, with the package's published weights of its channels."""
    tensors = load_file(path)
    weights = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu")
    shift, scale = (torch.tensor(numbers).view(3, 1, 1) for numbers in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x = [((torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1 - shift) / scale)[None] for picture in (a, b)]
    total = 0.0
    for layer, (number, (*_, stride, padding, pooled)) in enumerate(CONVOLUTIONS.items()):
        x = [nn.functional.max_pool2d(one, 3, 2) if pooled else one for one in x]
        weight, bias = tensors[f"features.{number}.weight"], tensors[f"features.{number}.bias"]
        x = [nn.functional.conv2d(one, weight, bias, stride, padding).relu() for one in x]
        unit = [one / one.square().sum(dim=1, keepdim=True).sqrt() for one in x]
        total += float(((unit[0] - unit[1]).square() * weights[f"lin{layer}.model.1.weight"]).sum(dim=1).mean())
    return total


def photographs(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(2, 64, 72, 3), dtype=np.uint8)


def test_lpips_is_its_formula_and_nothing_is_moved_by_chance(alexnet):
    a, b = photographs(0), photographs(1)
    before = torch.random.get_rng_state()
    judge = Lpips(alexnet)
    assert torch.equal(torch.random.get_rng_state(), before)
    found = judge.distances(a, b)
    assert found == pytest.approx([lpips_by_hand(alexnet, *pair) for pair in zip(a, b, strict=True)], rel=1e-4)
    assert judge.distances(a, a) == pytest.approx([0, 0], abs=1e-7)
    with pytest.raises(ValueError, match=r"images of one size(.|\n)*What to do"):
        judge.distances(a, b[:1])


def test_lpips_without_its_weights_says_where_they_are(tmp_path, alexnet):
    with pytest.raises(ValueError, match=r"LPIPS needs its weights: there is no file .*\n.*alexnet-owt-7be5be79\.pth"):
        Lpips(tmp_path / "none.pth")
    tensors = load_file(alexnet)
    del tensors["features.10.bias"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"not torchvision's AlexNet: features\.10\.bias missing"):
        Lpips(tmp_path / "half.safetensors")
