"""The processes of a run, one alone or several under torchrun. No other file knows the difference."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from .accelerator import module_of
from .packing import pack, unpack
from .randomness import undisturbed

# Longer than anything that one rank does alone while the others wait: saving, preview images.
TIMEOUT_S = 1800.0
Value = TypeVar("Value")


class RanksError(RuntimeError):
    """Another process of the run died or does not respond, or the processes did not find each other."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run: `rank` of `world`, `local_rank` on its machine. Leaving the context closes it.

    The context and every method raise RanksError when another process is gone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def open(cls, device_type: str = "cpu", timeout_s: float = TIMEOUT_S) -> Ranks:
        """Join the other processes if torchrun started this one; with a type of accelerators, select this process's device.

        CPU tensors are sent by gloo, those of accelerators by the library that torch has for their type (CUDA: nccl, without it gloo). A
        process without response for `timeout_s` counts as lost.
        """
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        local_rank = dist.distributed_c10d.get_node_local_rank()
        _take_device(device_type, local_rank)
        backend = "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:{_library_for(device_type)}"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except (dist.DistError, RuntimeError) as error:
            raise RanksError(
                f"The processes of this run did not find each other: {_first_line(error)}\n"
                "What to do: check that torchrun was started on every machine with the same --rdzv-endpoint, and that its port is open."
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        self.gather(None)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, the same on each; `value` is not changed."""
        total = value.detach().clone()
        if self.world > 1:
            with self._explained():
                dist.all_reduce(total)
        return total / self.world

    def gather(self, value: Value) -> list[Value]:
        """The small objects of all processes in the order of ranks, on each of them."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with self._explained():
            dist.all_gather_object(gathered, value)
        return gathered

    def share(self, value: Value) -> Value:
        """The `value` of rank 0, on every process: plain values (see `pack`), and tensors, which arrive on the CPU."""
        if self.world == 1:
            return value
        tensors: dict[str, Tensor] = {}
        packed = pack(value, tensors, "shared", copy=False) if self.is_main else None
        message: list[Any] = [packed, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}]
        with self._explained():
            # Tensors are sent separately: serialised as objects, gigabytes of weights would be in memory several times.
            dist.broadcast_object_list(message, src=0)
            packed, kinds = message
            for name, (shape, dtype) in kinds.items():
                if not self.is_main:
                    tensors[name] = torch.empty(shape, dtype=dtype)
                dist.broadcast(tensors[name], src=0)
        return unpack(packed, tensors)

    def scatter(self, values: list[Value] | None) -> Value:
        """This process's object of those on rank 0, one small object for each process."""
        own: list[Any] = [None]
        if self.world == 1:
            own = values or own
        else:
            with self._explained():
                dist.scatter_object_list(own, values, src=0)
        return own[0]

    def on_this_machine(self) -> int:
        """How many of the processes run on this machine, by its name in the network."""
        return self.gather(platform.node()).count(platform.node())

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set on any process, as for a request to stop."""
        return any(self.gather(flag))

    def wrap(self, module: Module) -> Module:
        """The module with gradients averaged over all processes and rank 0's weights; with one process, the module itself."""
        if self.world == 1:
            return module
        device = next(module.parameters()).device
        with self._explained():
            return DistributedDataParallel(module, device_ids=None if device.type == "cpu" else [device], gradient_as_bucket_view=True)

    def warm_up(self, wrapped: Module, example: Tensor) -> None:
        """A backward pass through a wrapped module whose gradients are discarded; random states are kept.

        torch rebuilds its gradient buckets after the first pass of a process. With three processes or more, the buckets decide the order
        of summation: without this, a resumed run would not give the same bits as an uninterrupted one.
        """
        if not isinstance(wrapped, DistributedDataParallel):
            return
        device = next(wrapped.parameters()).device
        with self._explained(), undisturbed():
            wrapped(example.to(device)).sum().backward()
        wrapped.zero_grad(set_to_none=True)

    def no_sync(self, module: Module) -> contextlib.AbstractContextManager[Any]:
        """While open, backward passes only accumulate gradients on each process: for all but the last batch of a step."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def close(self) -> None:
        """Leave the process group; after a failure, the end of the process does it."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif is_lost_process(error):
            raise self._lost(error) from error

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_lost_process(error):
                raise self._lost(error) from error
            raise

    def _lost(self, error: BaseException) -> RanksError:
        return RanksError(
            f"Rank {self.rank} of {self.world} stops because another process of the run died or does not respond: {_first_line(error)}\n"
            "What to do: correct the cause in that process's own message, then run the same command with --resume "
            "(evaluate continues without it)."
        )


def is_lost_process(error: BaseException) -> bool:
    """Whether this exception means that another process is gone: torch's own classes, or gloo's plain RuntimeError."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _library_for(device_type: str) -> str:
    usual = dist.Backend.default_device_backend_map.get(device_type, "gloo")
    return usual if usual != "nccl" or dist.is_nccl_available() else "gloo"


def _take_device(device_type: str, local_rank: int) -> None:
    module = module_of(device_type)
    if module is None:
        return
    gpus = module.device_count()
    if local_rank >= gpus:
        raise RanksError(
            f"Process {local_rank + 1} of this machine has no GPU: torch finds {gpus}.\n"
            "What to do: start torchrun with --nproc-per-node of at most that number."
        )
    if hasattr(module, "set_device"):  # Apple's has one device
        module.set_device(local_rank)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
