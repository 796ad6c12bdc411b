"""Correct gradients through ComfyUI's diffusion models, which are written for inference."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import torch
from torch import Tensor
from torch.nn import LayerNorm, Module

from .block_checkpoint import checkpointed, replaced_forward


def blocks_of(model: Module, block_lists: Iterable[str]) -> list[Module]:
    """The transformer blocks of a diffusion model, by the attributes that hold them."""
    blocks = [block for name in block_lists if (held := getattr(model, name, None)) is not None for block in held.children()]
    assert blocks, f"the diffusion model has no blocks in {', '.join(block_lists)}"
    return blocks


@contextlib.contextmanager
def differentiable(model: Module, blocks: Sequence[Module], checkpoint_blocks: bool, last_layers: Sequence[str] = ()) -> Iterator[None]:
    """Make gradients with respect to the model's inputs correct while the context is open, with block checkpointing or without.

    Blocks add to residual streams in place, and a LayerNorm has saved such a stream for its gradient: so LayerNorms get clones. RMSNorm
    modules normalize heads, which nothing overwrites (autograd would raise); their clones would cost 5% of memory. `last_layers` is the
    Family's.
    """
    with contextlib.ExitStack() as stack:
        if checkpoint_blocks:
            for block in blocks:
                stack.enter_context(replaced_forward(block, checkpointed(block, last_layers)))
        for norm in (module for module in model.modules() if isinstance(module, LayerNorm)):
            stack.callback(norm.register_forward_pre_hook(_clone_input).remove)
        # ComfyUI's own switch for fused functions without a backward. Not all of its models look at it.
        stack.enter_context(replaced(comfy.model_management, "in_training", True))
        # ComfyUI copies weights to the GPU asynchronously into buffers that it reuses, but autograd needs the weights later.
        stack.enter_context(replaced(comfy.model_management, "NUM_STREAMS", 0))
        # No model offers a switch for these two: a norm that is a plain function, and rotary embeddings of compiled code.
        stack.enter_context(replaced(comfy.ldm.common_dit, "rms_norm", _on_clone(comfy.ldm.common_dit.rms_norm)))
        stack.enter_context(_eager_rotary_embeddings())
        yield


@contextlib.contextmanager
def _eager_rotary_embeddings() -> Iterator[None]:
    """comfy_kitchen's rotary embeddings in their eager form, which autograd sees through; older versions have fewer of them or none."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("comfy_kitchen") is not None:
            kitchen, eager = (importlib.import_module(name) for name in ("comfy_kitchen", "comfy_kitchen.backends.eager.rope"))
            for name in (name for name in vars(eager) if "rope" in name and not name.startswith("_") and hasattr(kitchen, name)):
                stack.enter_context(replaced(kitchen, name, getattr(eager, name)))
        yield


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value while the context is open."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _clone_input(_module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    return (inputs[0].clone(), *inputs[1:]) if torch.is_grad_enabled() else None


def _on_clone(function: Any) -> Any:
    def on_clone(x: Tensor, *more: Any, **named: Any) -> Tensor:
        return function(x.clone() if torch.is_grad_enabled() else x, *more, **named)

    return on_clone
