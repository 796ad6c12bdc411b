"""What tensor code takes: the bytes of live tensors by part, with their peak, and floating-point operations by number format.

It counts fake tensors, which have no numbers, as well as real ones. `.item()` of a fake tensor gives 1 or True: finite and not zero, which
is all that the code of a training step asks of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
# Parts that the ledger itself tells apart.
MODEL, CASTS, BROUGHT = "diffusion model, frozen", "copies of its weights, cast", "copies of its weights, from RAM"
# What makes a copy of a weight.
COPYING = {aten._to_copy, aten.empty_like, aten.clone}


def _attention(query: Tensor, key: Tensor, value: Tensor, *_more: Any, **_named: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_more: Any, **_named: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


# torch has formulas for the fused attention of GPUs, and none for that of CPUs.
ATTENTION_ON_CPU: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass
class Most:
    """The most bytes at once, by part, and the part that was being computed."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    during: str = ""


class Ledger(TorchDispatchMode):
    """Counts while it is open; tensors on other devices than `device` are left out.

    all_here: the peak with the diffusion model on the device, where its weights are copied only to be cast. offloaded: the peak without its
    weights, where each is brought from RAM when it is used. Both come from one pass in which every weight is copied.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.part = "others"
        self.live: Counter[str] = Counter()
        self.flops: Counter[torch.dtype] = Counter()
        self.all_here, self.offloaded = Most(), Most()
        self._parts: dict[int, str] = {}
        self._formulas = {**flop_registry, **ATTENTION_ON_CPU}

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what is made while the context is open as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def restart(self) -> None:
        """Forget the peaks and the operations; what is live stays counted."""
        self.flops.clear()
        self.all_here, self.offloaded = Most(), Most()
        self._see()

    def is_part(self, value: Tensor, part: str) -> None:
        """Count a tensor as this part from now on."""
        key, size = value.untyped_storage()._cdata, value.untyped_storage().nbytes()
        if before := self._parts.get(key):
            self.live[before] -= size
            self.live[part] += size
            self._parts[key] = part
        else:
            self._add(value, part)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        named = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _number(args[0])
        out, packet = func(*args, **named), func._overloadpacket
        if formula := self._formulas.get(packet):
            first = next(value for value in args if isinstance(value, Tensor))
            self.flops[first.dtype] += formula(*args, **named, out_val=out)
        part = self._copied(args[0], out) if packet in COPYING else None
        for value in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type == self.device.type:
                self._add(value, part or self.part)
        return out

    def _copied(self, source: Tensor, copy: Tensor) -> str | None:
        """The part of a copy of the diffusion model's weights; None for one of anything else."""
        if self._parts.get(source.untyped_storage()._cdata) not in (MODEL, CASTS, BROUGHT):
            return None
        return BROUGHT if source.dtype == copy.dtype else CASTS

    def _add(self, value: Tensor, part: str) -> None:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._parts or not size:
            return
        self._parts[key] = part
        self.live[part] += size
        weakref.finalize(storage, self._gone, key, size)
        self._see()

    def _gone(self, key: int, size: int) -> None:
        self.live[self._parts.pop(key)] -= size

    def _see(self) -> None:
        total = self.live.total()
        for most, left_out in ((self.all_here, BROUGHT), (self.offloaded, MODEL)):
            if total - self.live[left_out] > most.total:
                most.total, most.during = total - self.live[left_out], self.part
                most.parts = {part: size for part, size in self.live.items() if size and part != left_out}


def _number(value: Tensor) -> float | int | bool:
    return True if value.dtype == torch.bool else 1.0 if value.is_floating_point() else 1
