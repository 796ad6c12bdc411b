"""The one denoising loop equals ComfyUI's own KSampler, and one schedule serves each purpose."""

from __future__ import annotations

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from distilled_t5.diffusion.denoise import denoise
from distilled_t5.diffusion.frozen import FrozenModel
from distilled_t5.families import FAMILIES
from distilled_t5.miniature.files import FLUX_FILE, place
from distilled_t5.runtime.model_folders import SHIPPED
from distilled_t5.tests.support.denoising import sampled_by_comfyui
from distilled_t5.tests.support.small_models import SMALL_MODELS
from torch import Tensor

STEPS, BATCH, TOKENS = 5, 3, 24


@pytest.fixture(scope="module")
def miniature() -> FrozenModel:
    patcher = comfy.sd.load_diffusion_model(str(place(SHIPPED, FLUX_FILE)))
    return FrozenModel(patcher, FAMILIES["flux"], exact_gradients=False)


def test_the_loop_equals_the_stock_sampler_bit_for_bit_on_the_miniature(miniature: FrozenModel) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(BATCH, *FAMILIES["flux"].latent_shape(64), generator=generator)
    text_BLD = torch.randn(BATCH, TOKENS, miniature.text_width, generator=generator)
    extras = {"pooled_output": torch.randn(BATCH, 768, generator=generator), "guidance": 2.5}
    expected_starts: list[Tensor] = []
    expected = sampled_by_comfyui(
        miniature.patcher, noise, STEPS, text_BLD, extras, lambda _step, _denoised, x, _total: expected_starts.append(x.clone())
    )
    starts: list[Tensor] = []
    miniature.load_for_sampling(noise.shape)
    sigmas_T = miniature.sigmas(STEPS)
    found = denoise(miniature, noise, sigmas_T, text_BLD, extras, on_step=lambda _step, x: starts.append(x.clone()))
    assert torch.equal(found, expected)
    assert len(starts) == STEPS and all(map(torch.equal, starts, expected_starts))
    by_sample = denoise(miniature, noise, sigmas_T, text_BLD, extras, guidance_B=torch.full((BATCH,), 2.5))
    assert torch.equal(by_sample, expected)
    guidance_B = torch.tensor([2.5, 2.5, 4.0])
    of_its_own = denoise(miniature, noise, sigmas_T, text_BLD, extras, guidance_B=guidance_B)
    assert torch.equal(of_its_own[:2], expected[:2]) and not torch.equal(of_its_own[2], expected[2])


@pytest.mark.parametrize("name", ["mochi", "cosmos", "z_image"])
def test_the_loop_equals_the_stock_sampler_for_videos_and_noise_levels_beyond_one(name: str) -> None:
    small = SMALL_MODELS[name]
    patcher = small.patcher()
    model = FrozenModel(patcher, FAMILIES["flux"])
    noise, _, text_BLD, extras = small.inputs()
    expected = sampled_by_comfyui(patcher, noise, STEPS, text_BLD, extras)
    model.load_for_sampling(noise.shape)
    assert torch.equal(denoise(model, noise, model.sigmas(STEPS), text_BLD, extras), expected)


def test_trajectories_are_shifted_by_resolution_and_images_are_not(miniature: FrozenModel) -> None:
    shifted = ModelSamplingFlux().patch(miniature.patcher, max_shift=1.15, base_shift=0.5, width=512, height=512)[0]
    expected = comfy.samplers.calculate_sigmas(shifted.get_model_object("model_sampling"), "simple", STEPS)
    torch.testing.assert_close(miniature.training_sigmas(STEPS, 64, 64), expected)
    sampling = miniature.patcher.get_model_object("model_sampling")
    assert torch.equal(miniature.sigmas(STEPS), comfy.samplers.calculate_sigmas(sampling, "simple", STEPS))
    assert not torch.allclose(miniature.sigmas(STEPS), expected, atol=1e-2)
