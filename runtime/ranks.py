"""The processes of one run. Started alone or by torchrun, nothing outside this file knows the difference."""

from __future__ import annotations

import contextlib
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

from .packing import pack, unpack

# Longer than anything that one rank does alone while the others wait: saving, a contact sheet.
TIMEOUT_S = 1800.0
Value = TypeVar("Value")


class RanksError(RuntimeError):
    """Another process of the run died or does not answer, or the processes did not find each other."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run: `rank` of `world`, the `local_rank`-th on its machine. Close it by leaving its context.

    What torch raises when another process is gone leaves the context, and every method here, as RanksError.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def open(cls, device_type: str = "cpu", timeout_s: float = TIMEOUT_S) -> Ranks:
        """Join the other processes if torchrun started this one; with "cuda" the process's GPU becomes the current one.

        CPU tensors travel by gloo, CUDA tensors by nccl where torch has it. A process that does not answer for `timeout_s` counts as lost.
        """
        if not (dist.is_available() and dist.is_torchelastic_launched()):
            return cls()
        local_rank = dist.distributed_c10d.get_node_local_rank()
        if device_type == "cuda":
            _take_gpu(local_rank)
        on_gpus = "nccl" if dist.is_nccl_available() else "gloo"
        backend = f"cpu:gloo,cuda:{on_gpus}" if device_type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        except (dist.DistError, RuntimeError) as error:
            raise RanksError(
                f"The processes of this run did not find each other: {_first_line(error)}\n"
                "What to do: see that torchrun was started on every machine with the same --rdzv-endpoint, and that this port is reachable."
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), local_rank)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, the same on each; `value` stays as it is."""
        total = value.detach().clone()
        if self.world > 1:
            with self._company():
                dist.all_reduce(total)
        return total / self.world

    def gather(self, value: Value) -> list[Value]:
        """A small object of every process, in the order of ranks, on each of them."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with self._company():
            dist.all_gather_object(gathered, value)
        return gathered

    def share(self, value: Value) -> Value:
        """What `value` is on rank 0, on every process: plain values (see `pack`), and tensors, which arrive on the CPU."""
        if self.world == 1:
            return value
        tensors: dict[str, Tensor] = {}
        packed = pack(value, tensors, "shared", copy=False) if self.is_main else None
        told: list[Any] = [packed, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}]
        with self._company():
            # Only what is small goes as an object: gigabytes of weights would lie in memory several times over.
            dist.broadcast_object_list(told, src=0)
            packed, kinds = told
            for name, (shape, dtype) in kinds.items():
                if not self.is_main:
                    tensors[name] = torch.empty(shape, dtype=dtype)
                dist.broadcast(tensors[name], src=0)
        return unpack(packed, tensors)

    def scatter(self, values: list[Value] | None) -> Value:
        """This process's one of the small objects that rank 0 has, one for each process."""
        own: list[Any] = [None]
        if self.world == 1:
            own = values or own
        else:
            with self._company():
                dist.scatter_object_list(own, values, src=0)
        return own[0]

    def any_of(self, flag: bool) -> bool:
        """Whether the flag is set on any process: the way to agree on stopping."""
        return any(self.gather(flag))

    def wrap(self, module: Module) -> Module:
        """The module with gradients averaged over all processes; alone, the module itself. All start from rank 0's weights."""
        if self.world == 1:
            return module
        device = next(module.parameters()).device
        with self._company():
            return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def warm_up(self, wrapped: Module, example: Tensor) -> None:
        """A backward pass through a wrapped module whose gradients are thrown away; chance is left as it was.

        torch sorts gradients into buckets anew after the first pass of a process. From three processes on, the buckets decide in which
        order is added up: without this a resumed run would not end in the bits of one that went on.
        """
        if not isinstance(wrapped, DistributedDataParallel):
            return
        device = next(wrapped.parameters()).device
        with self._company(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            wrapped(example.to(device)).sum().backward()
        wrapped.zero_grad(set_to_none=True)

    def no_sync(self, module: Module) -> contextlib.AbstractContextManager[Any]:
        """While open, backward passes of a wrapped module only add up gradients: for all but the last of accumulated batches."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()

    def close(self) -> None:
        """Leave the other processes in order; after a failure the end of the process does it at once."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        elif is_loss_of_company(error):
            raise self._lost(error) from error

    @contextlib.contextmanager
    def _company(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_loss_of_company(error):
                raise self._lost(error) from error
            raise

    def _lost(self, error: BaseException) -> RanksError:
        return RanksError(
            f"Rank {self.rank} of {self.world} stops because another process of the run died or does not answer: {_first_line(error)}\n"
            "What to do: look for that process's own message; mend what it says, then run the same command with --resume "
            "(evaluate goes on without it)."
        )


def is_loss_of_company(error: BaseException) -> bool:
    """Whether torch says with this exception that another process is gone: its own classes, or gloo's plain RuntimeError."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))


def _take_gpu(local_rank: int) -> None:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise RanksError(
            f"Process {local_rank + 1} of this machine has no GPU: torch sees {gpus}.\n"
            "What to do: start torchrun with --nproc-per-node of at most that number."
        )
    torch.cuda.set_device(local_rank)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
