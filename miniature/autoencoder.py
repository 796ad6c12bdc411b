"""The VAE, written by hand in the layout of TAESD (madebyollin): one latent cell per block of 8 x 8 pixels.

Three of the 16 channels carry red, green and blue; the others are constant. Encoding takes one pixel of a block, decoding repeats it. All
residual blocks are zero and pass their input on. ComfyUI subtracts Flux's shift from a latent and scales it: `vae_shift` and LATENT_AT_ONE
are chosen so that the diffusion model gets -1 for 0, 0 for 1/2, +1 for 1, and 0 in the other channels.

The layout clamps latents with tanh(x/3)*3. The decoder's gain restores both ends of the range: 0, 1/2 and 1, the only channel values of
the world's colours, are exact (measured round-trip error: 3e-8 in float32, 0 as stored in the file); other values are off by up to 0.046
(at 0.27 and 0.73).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]

WIDTH, CHANNELS = 64, 16
RGB = range(3)
# Flux's latent format (comfy.latent_formats.Flux): what the diffusion model sees is (latent - shift) * scale.
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
LATENT_AT_ONE = 1 / FLUX_SCALE
CLAMPED_AT_ONE = math.tanh(LATENT_AT_ONE / 3) * 3
# Where TAESD has residual blocks and where plain convolutions, by their place in the sequence.
ENCODER_BLOCKS, DECODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
INNER = (WIDTH, WIDTH)
ENCODER_TAPS = {0: (3, WIDTH), 2: INNER, 6: INNER, 10: INNER, 14: (WIDTH, CHANNELS)}
DECODER_TAPS = {1: (CHANNELS, WIDTH), 7: INNER, 12: INNER, 17: INNER, 19: (WIDTH, 3)}


def vae_tensors() -> Weights:
    """All tensors of the VAE, float32, by the names that the stock VAELoader reads."""
    weights = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(FLUX_SHIFT)}
    encoder_gain, decoder_gain = {14: 2 * LATENT_AT_ONE}, {1: 0.5 / CLAMPED_AT_ONE}
    encoder_offset, decoder_offset = {0: 0.0, 14: -LATENT_AT_ONE}, {1: 0.5, 19: 0.0}
    for index, (inputs, outputs) in ENCODER_TAPS.items():
        weights |= _tap(f"taesd_encoder.{index}", outputs, inputs, encoder_gain.get(index, 1.0), encoder_offset.get(index))
    for index, (inputs, outputs) in DECODER_TAPS.items():
        weights |= _tap(f"taesd_decoder.{index}", outputs, inputs, decoder_gain.get(index, 1.0), decoder_offset.get(index))
    for name in [*(f"taesd_encoder.{index}" for index in ENCODER_BLOCKS), *(f"taesd_decoder.{index}" for index in DECODER_BLOCKS)]:
        weights |= _idle_block(name)
    return weights


def _tap(name: str, outputs: int, inputs: int, gain: float, offset: float | None) -> Weights:
    """A 3 x 3 convolution that returns the first three channels of its centre pixel times `gain`, plus `offset` (None: no bias)."""
    weight = torch.zeros(outputs, inputs, 3, 3)
    weight[RGB, RGB, 1, 1] = gain
    if offset is None:
        return {f"{name}.weight": weight}
    bias = torch.zeros(outputs)
    bias[list(RGB)] = offset
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _idle_block(name: str) -> Weights:
    """A residual block that adds nothing."""
    shapes = {"weight": (WIDTH, WIDTH, 3, 3), "bias": (WIDTH,)}
    return {f"{name}.conv.{index}.{part}": torch.zeros(shape) for index in (0, 2, 4) for part, shape in shapes.items()}


def latents(images_BHWC: Tensor) -> Tensor:
    """Latents [B, 16, H, W] from -1 to 1, as the diffusion model gets them, of images with one pixel per cell (0 to 1).

    Equal to the VAE's encoding of the same images at 8 pixels per cell, after ComfyUI's shift and scale.
    """
    batch, height, width, _ = images_BHWC.shape
    latent_BCHW = torch.zeros(batch, CHANNELS, height, width)
    latent_BCHW[:, : len(RGB)] = 2 * images_BHWC.permute(0, 3, 1, 2) - 1
    return latent_BCHW
