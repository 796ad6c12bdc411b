"""What a text is inside the diffusion model. The pass ends where that is known: later blocks are neither computed nor read."""

# B batch

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

if TYPE_CHECKING:
    from .frozen import FrozenModel

Run = Callable[[], Tensor]


class _Ended(Exception):
    """The pass has reached what it was to show."""


def streams_after(model: FrozenModel, blocks: int, run: Run, to_the_end: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """The streams of `image` and `text` [B, rows, channels] after the first blocks, where both are used later, and what `run` returns.

    `run` is a pass. It ends at the last of these blocks and returns nothing, unless `to_the_end`.
    """
    assert blocks > 0
    (first, first_names), (block, names) = model.streams[0], model.streams[blocks - 1]
    seen: dict[str, Tensor] = {}
    text_rows: list[int] = []

    def count(output: Any) -> None:
        # Some models pad the text.
        text_rows.extend(stream.shape[1] for name, stream in _by_name(output, first_names).items() if name == "text")

    def see(output: Any) -> None:
        seen.update(_by_name(output, names, *text_rows))
        if blocks > len(model.streams) - model.family.last_blocks_without_text:
            seen.pop("text", None)
        if not to_the_end:
            raise _Ended
        # Later blocks add to them in place.
        seen.update({name: stream.clone() for name, stream in seen.items()})

    with _watched(first, count), _watched(block, see), contextlib.suppress(_Ended):
        return seen, run()
    return seen, None


def _by_name(output: Any, names: tuple[str, ...], text_rows: int = 0) -> dict[str, Tensor]:
    if names == ("text+image",):
        return {"text": output[:, :text_rows], "image": output[:, text_rows:]}
    outputs = output if isinstance(output, tuple) else (output,)
    return {name: stream for name, stream in zip(names, outputs, strict=True) if stream is not None}


def keys_and_values(model: FrozenModel, run: Run, batch: int) -> tuple[Tensor, ...]:
    """The text's keys and values in the first block, [B, all of them] each; `run` is a pass, which ends there."""
    block, wanted = model.blocks[0], model.family.keys_values
    seen: dict[str, Tensor] = {}

    def see(name: str, output: Tensor) -> None:
        seen[name] = output
        if len(seen) == len({layer for layer, *_ in wanted}):
            raise _Ended

    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_checkpoint(block))
        for name in {layer for layer, *_ in wanted}:
            stack.enter_context(_watched(block.get_submodule(name), functools.partial(see, name)))
        with contextlib.suppress(_Ended):
            run()
    return tuple(seen[name].chunk(of, dim=-1)[part].reshape(batch, -1) for name, part, of in wanted)


@contextlib.contextmanager
def _watched(module: Module, see: Callable[[Any], None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: see(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _without_checkpoint(block: Module) -> Iterator[None]:
    """Let a block keep its intermediate results, through which gradients are to flow."""
    checkpointed = vars(block).pop("forward", None)
    try:
        yield
    finally:
        if checkpointed is not None:
            block.forward = checkpointed  # type: ignore[method-assign]
