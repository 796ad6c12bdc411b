"""The frozen diffusion model as a function: latents, noise level and text in, velocity out, differentiable with respect to the text."""

# B batch, C H W latent, L text tokens, D text width, P pooled width, T steps

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor
from torch.nn import LayerNorm, Module

from ..train.memory import FlowSize
from .block_checkpoint import checkpointed, replaced_forward

# Flux's resolution-dependent shift: mu is linear in the number of image tokens (black-forest-labs/flux, sampling.get_schedule).
FEWEST_TOKENS, MOST_TOKENS = 256, 4096
SHIFT_AT_FEWEST, SHIFT_AT_MOST = 0.5, 1.15
PATCH = 2


class FrozenFlow:
    """A diffusion model of ComfyUI that predicts velocity, frozen, on whatever device its patcher puts it."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self.model = patcher.model
        self.model.requires_grad_(False)
        if any(getattr(module, "layout_type", None) for module in self.model.modules()):
            # Quantised layers quantise what they are given, too, on cards that multiply in fp8. That has no gradient in ComfyUI 0.16 and a
            # rough one in 0.30 (7 % off in a test). So the host is told to compute with the weights alone quantised.
            patcher.force_cast_weights = True

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The format that it computes in, which may be wider than the one its weights are held in."""
        return self.model.get_dtype_inference()

    @property
    def text_width(self) -> int:
        """Width of the text embedding that the model takes."""
        return self.model.diffusion_model.params.context_in_dim

    @property
    def guided(self) -> bool:
        """Whether the model takes guidance (dev) or not (schnell)."""
        return bool(self.model.diffusion_model.params.guidance_embed)

    def size(self) -> FlowSize:
        """What it takes of memory, for `memory_need`."""
        model = self.model.diffusion_model
        return FlowSize(
            held_bytes=held_bytes(model),
            weights=_weights(model),
            largest_block=max(map(_weights, blocks_of(model))),
            blocks=len(blocks_of(model)),
            width=model.params.hidden_size,
            compute_bytes=self.compute_dtype.itemsize,
        )

    def load(self, memory_required: int = 0) -> None:
        """Bring the model to its device, the host's way; other models make room as the host decides."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory_required)

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor, text_BLD: Tensor, pooled_BP: Tensor, guidance_B: Tensor | None) -> Tensor:
        """Velocity [B, C, H, W], float32, of the latent `x` at noise level `sigma` in (0, 1].

        The host's model gives the denoised latent x - sigma * velocity; the velocity is read back from it.
        """
        extras = {"y": pooled_BP} if guidance_B is None else {"y": pooled_BP, "guidance": guidance_B}
        x_BCHW = x_BCHW.float()
        denoised_BCHW = self.model.apply_model(x_BCHW, sigma_B, c_crossattn=text_BLD, transformer_options={}, **extras)
        return (x_BCHW - denoised_BCHW) / sigma_B.view(-1, 1, 1, 1)

    def sigmas(self, steps: int, height: int, width: int) -> Tensor:
        """Noise levels [T + 1] from 1 to 0 as the host's `simple` scheduler gives them for a latent of this size.

        Guided models (dev) are shifted by resolution, as ModelSamplingFlux does; schnell is not.
        """
        sampling = self.model.model_sampling
        if not self.guided:
            return comfy.samplers.calculate_sigmas(sampling, "simple", steps)
        shifted = type(sampling)(self.model.model_config)
        shifted.set_parameters(shift=resolution_shift(height, width))
        return comfy.samplers.calculate_sigmas(shifted, "simple", steps)


def resolution_shift(height: int, width: int) -> float:
    """Flux's shift mu for a latent of height x width: 0.5 at 256 image tokens, 1.15 at 4096, linear between and beyond."""
    tokens = (height // PATCH) * (width // PATCH)
    return SHIFT_AT_FEWEST + (SHIFT_AT_MOST - SHIFT_AT_FEWEST) * (tokens - FEWEST_TOKENS) / (MOST_TOKENS - FEWEST_TOKENS)


def blocks_of(model: Module) -> list[Module]:
    """The transformer blocks of a Flux, double and single ones."""
    blocks = [block for name in ("double_blocks", "single_blocks") for block in getattr(model, name, [])]
    assert blocks, "the diffusion model has no blocks that are known here"
    return blocks


def held_bytes(model: Module) -> int:
    """Bytes of a model's weights as they are held, quantised ones as such."""
    return comfy.model_management.module_size(model)


def usable_bytes(device: torch.device) -> int:
    """The memory of a device without what the host keeps free of it (`--reserve-vram`)."""
    return comfy.model_management.get_total_memory(device) - comfy.model_management.extra_reserved_memory()


def _weights(model: Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@contextlib.contextmanager
def differentiable(model: Module, checkpoint_blocks: bool) -> Iterator[None]:
    """Make gradients with respect to the model's inputs right while the context is open, with block checkpointing or without.

    The host's blocks add their residuals in place, onto tensors that a LayerNorm has saved for its gradient: so every LayerNorm gets a
    clone. A recomputed block gets clones of its inputs as well, since it would start from overwritten ones the second time.
    """
    blocks = blocks_of(model)
    with contextlib.ExitStack() as stack:
        if checkpoint_blocks:
            for block in blocks:
                stack.enter_context(replaced_forward(block, checkpointed(block)))
        for norm in (module for module in model.modules() if isinstance(module, LayerNorm)):
            stack.callback(norm.register_forward_pre_hook(_clone_input).remove)
        stack.callback(setattr, comfy.model_management, "in_training", comfy.model_management.in_training)
        # The host's fused rotary embedding has no backward; this is the switch it offers.
        comfy.model_management.in_training = True
        yield


def _clone_input(_module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (inputs[0].clone(), *inputs[1:]) if torch.is_grad_enabled() else None
