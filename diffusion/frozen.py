"""The frozen diffusion model as a function of latent, noise level and conditioning, differentiable with respect to the text."""

# B batch, C channels, H W latent (... any number of dimensions), L text tokens, D text width, T steps

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor
from torch.nn import Module

from ..families.family import Family
from .gradients import blocks_of, differentiable
from .projection import text_projection

SCHEDULER = "simple"


class FrozenModel:
    """A diffusion model of ComfyUI, frozen, on the device that its patcher chooses.

    exact_gradients: compute with quantised weights but unquantised activations. Quantised layers quantise their inputs too on cards that
    multiply in fp8: that has no gradient in ComfyUI 0.16 and an approximate one in 0.30 (7% off in a test). False computes exactly as a
    KSampler does.
    """

    def __init__(self, patcher: Any, family: Family, exact_gradients: bool = True) -> None:
        self.patcher = patcher
        self.family = family
        self.model = patcher.model
        self.model.requires_grad_(False)
        if exact_gradients and any(getattr(module, "layout_type", None) for module in self.model.modules()):
            patcher.force_cast_weights = True

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The format of its arithmetic, which may be wider than that of its weights."""
        return self.model.get_dtype_inference()

    @property
    def text_width(self) -> int:
        """Channels of the text embedding that the model takes."""
        return self.family.text_width_of(self.model)

    @property
    def takes_guidance(self) -> bool:
        """Whether the model has a guidance input (Flux dev) or not (schnell)."""
        return self.family.takes_guidance(self.model)

    @property
    def blocks(self) -> list[Module]:
        """The transformer blocks."""
        return blocks_of(self.model.diffusion_model, self.family.block_lists)

    @property
    def streams(self) -> list[tuple[Module, tuple[str, ...]]]:
        """The transformer blocks, with what each returns; see `Family.block_lists`."""
        lists = self.family.block_lists.items()
        return [(block, streams) for name, streams in lists for block in blocks_of(self.model.diffusion_model, [name])]

    @functools.cached_property
    def text_projection(self) -> Module:
        """The layers through which the text goes before the first block, in float32 on the device. They stay there."""
        found = self.model.diffusion_model.state_dict()
        # Copies, as the model's own leave the device with it.
        tensors = {name: tensor.clone() for name, tensor in found.items() if name.startswith(self.family.text_projection)}
        return text_projection(self.model.model_config, self.family, tensors, self.device)

    def load(self, memory_required: int = 0) -> None:
        """Bring the model to its device through ComfyUI, which unloads other models as needed."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory_required)

    def load_for_sampling(self, shape: Sequence[int]) -> None:
        """Bring the model to its device with as much free memory as ComfyUI reserves for sampling latents [B, C, ...] of this shape."""
        self.load(self.model.memory_required([2 * shape[0], *shape[1:]]))

    def differentiable(self, checkpoint_blocks: bool) -> contextlib.AbstractContextManager[None]:
        """Correct gradients with respect to the text while the context is open, with block checkpointing or without."""
        return differentiable(self.model.diffusion_model, self.blocks, checkpoint_blocks, self.family.last_layers)

    def velocity(self, x: Tensor, sigma_B: Tensor, text_BLD: Tensor, extras: Mapping[str, Any], guidance_B: Tensor | None = None) -> Tensor:
        """What Euler's method steps along, (x - x0) / sigma, float32, in the shape of `x` [B, C, ...].

        That is the velocity of a flow model, and epsilon of a model that predicts noise. `text_BLD` and `extras` are a conditioning entry
        as CLIPTextEncode makes it; `guidance_B` gives each sample a guidance of its own.
        """
        x = x.float()
        conditions = self._conditions(x, text_BLD, extras)
        if guidance_B is not None:
            conditions["guidance"] = guidance_B
        options = {"sigmas": sigma_B, "sample_sigmas": sigma_B}
        denoised = self.model.apply_model(x, sigma_B, transformer_options=options, **conditions)
        return (x - denoised) / sigma_B.view(-1, *[1] * (x.ndim - 1))

    def _conditions(self, x: Tensor, text_BLD: Tensor, extras: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords of `apply_model`, made of a conditioning entry by ComfyUI's own functions."""
        entries = comfy.sampler_helpers.convert_cond([[text_BLD, dict(extras)]])
        [entry] = comfy.samplers.encode_model_conds(self.model.extra_conds, entries, x, x.device, "positive")
        return {name: condition.process_cond(batch_size=len(x), area=None).cond for name, condition in entry["model_conds"].items()}

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels [T + 1] of a KSampler with ComfyUI's `simple` scheduler: for whatever is compared with a user's images.

        The evaluation uses it for images, latents and velocity gaps alike. What follows the paper uses `training_sigmas` instead.
        """
        return comfy.samplers.calculate_sigmas(self._sampling, SCHEDULER, steps)

    def training_sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """Noise levels [T + 1] that the model was trained with at this latent size, as its family has them.

        The trainer uses it for trajectories, the held-out loss and previews. Where a family has none of its own, they are `sigmas`.
        """
        own = self.family.training_sigmas
        return self.sigmas(steps) if own is None else own(self.model, steps, height, width)

    def noisy(self, noise: Tensor, sigmas_T: Tensor) -> Tensor:
        """The latent [B, C, ...] that sampling starts from: `noise` scaled to the first noise level, as a KSampler does it."""
        first, highest = float(sigmas_T[0]), float(self._sampling.sigma_max)
        is_highest = first > highest or math.isclose(first, highest, rel_tol=1e-5)
        return self._sampling.noise_scaling(sigmas_T[0].to(noise), noise.clone(), torch.zeros_like(noise), is_highest)

    def decodable(self, x: Tensor, sigmas_T: Tensor) -> Tensor:
        """A sampled latent as a VAE takes it, as a KSampler returns it."""
        return self.model.process_latent_out(self._sampling.inverse_noise_scaling(sigmas_T[-1].to(x), x).float())

    @property
    def _sampling(self) -> Any:
        return self.patcher.get_model_object("model_sampling")


def held_bytes(model: Module) -> int:
    """Bytes of a model's weights as they are held, quantised ones as such."""
    return comfy.model_management.module_size(model)


def usable_bytes(device: torch.device) -> int:
    """The memory of a device without what ComfyUI keeps free of it (`--reserve-vram`)."""
    return comfy.model_management.get_total_memory(device) - comfy.model_management.extra_reserved_memory()
