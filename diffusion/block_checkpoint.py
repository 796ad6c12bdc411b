"""Block checkpointing: a block of the diffusion model keeps only its inputs, and is computed again for its gradient.

Two differences from torch.utils.checkpoint. Inputs are cloned before a block overwrites them. And the second time, the last products of a
block are left out: they only contribute to its output, which is known, and are a third of its arithmetic.
"""

# B batch, L tokens, D width

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.ops
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Linear, Module, Sequential

Forward = Callable[..., Any]


@contextlib.contextmanager
def replaced_forward(module: Module, forward: Forward) -> Iterator[None]:
    """Replace a module's forward while the context is open."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward  # uncovers the class's own


def checkpointed(block: Module, last_layers: Sequence[str]) -> Forward:
    """The block's forward, with the same results and gradients, that keeps no intermediate results of the block.

    `last_layers`: attributes of the block; the product of the last linear layer in each leads to the block's output alone.
    """
    ends = [getattr(block, name, None) for name in last_layers]
    return functools.partial(_forward, [end[-1] if isinstance(end, Sequential) else end for end in ends], block.forward)


def _forward(last: Sequence[Module | None], forward: Forward, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    given = {**dict(enumerate(inputs)), **named}
    streams = {key: value for key, value in given.items() if _is_stream(value)}

    def on_clones(*values: Tensor) -> Any:
        filled = given | {key: value.clone() for key, value in zip(streams, values, strict=True)}
        return forward(*(filled[index] for index in range(len(inputs))), **{name: filled[name] for name in named})

    # The gradient of a modulation needs the product that it scales.
    modulated = any(value.requires_grad and value.ndim < 3 for value in streams.values())
    again = contextlib.nullcontext if modulated else functools.partial(_last_products_left_out, last)
    return _Recomputed.apply(on_clones, again, *streams.values())


def _is_stream(value: Any) -> bool:
    """Whether a block's input may carry text or be overwritten: a modulation [B, D] that needs a gradient, or any residual stream."""
    return isinstance(value, Tensor) and value.is_floating_point() and (value.requires_grad or value.ndim >= 3)


class _Recomputed(torch.autograd.Function):
    """Run without gradient, and again with it in the backward pass, in a context that `again` opens."""

    @staticmethod
    def forward(ctx: Any, run: Forward, again: Callable[[], contextlib.AbstractContextManager[None]], *streams: Tensor) -> Any:
        ctx.run, ctx.again = run, again
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*streams)
        return run(*streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [stream.detach().requires_grad_(need) for stream, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad(), ctx.again():
            outputs = ctx.run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        reached = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results, their_gradients = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(results, wanted, their_gradients, allow_unused=True))
        return None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


@contextlib.contextmanager
def _last_products_left_out(last: Sequence[Module | None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for layer in last:
            # ComfyUI's quantised layers are not torch Linear, and are computed.
            if isinstance(layer, Linear):
                stack.enter_context(replaced_forward(layer, functools.partial(_without_product, layer, layer.forward)))
        yield


def _without_product(layer: Linear, forward: Forward, input_BLD: Tensor) -> Tensor:
    # In float16 ComfyUI clamps what has overflowed, where the gradient is zero: that depends on the output.
    return forward(input_BLD) if input_BLD.dtype == torch.float16 else _UnusedOutput.apply(input_BLD, layer)


class _UnusedOutput(torch.autograd.Function):
    """A linear layer whose output is not used: only its gradient with respect to the input is computed."""

    @staticmethod
    def forward(ctx: Any, input_BLD: Tensor, layer: Linear) -> Tensor:
        ctx.layer = layer
        return input_BLD.new_empty(*input_BLD.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BLD: Tensor) -> tuple[Tensor, None]:
        weight, bias, stream = comfy.ops.cast_bias_weight(ctx.layer, gradient_BLD, offloadable=True)
        found_BLD = gradient_BLD @ weight
        comfy.ops.uncast_bias_weight(ctx.layer, weight, bias, stream)
        return found_BLD, None
