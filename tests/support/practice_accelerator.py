"""A practice accelerator: a device of its own with the CPU's numbers and a memory that is counted and bounded.

`install()` registers it for the process as `npu`, a name that ComfyUI knows, before ComfyUI and transformers are imported. Its kernels are
the CPU's, and under torchrun gloo connects the processes. As on a GPU, mixing its tensors with the CPU's raises RuntimeError, going beyond
its memory raises `torch.OutOfMemoryError`, and its random numbers come from a generator of its own.

Other code uses `install`, `set_budget`, `reset_peak`, and of `memory` what is `allocated` and its `peak`.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
# What a device without a bound says that it has.
PLENTY_BYTES = 64 << 30
# Operators that take tensors of both devices on a GPU too: copies, and indices.
MIXED = {f"aten::{name}" for name in ("copy_", "_foreach_copy_", "index", "index_put", "index_put_", "_index_put_impl_")}
RANDOM = torch.Tag.nondeterministic_seeded
_libraries: list[torch.library.Library] = []


class Memory:
    """The device's memory in bytes: what is allocated now, the most since `reset_peak`, and what it has."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self.device = torch.device("cpu")  # until the name is registered
        self.budget = PLENTY_BYTES
        self._held: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()

    def hold(self, raw: Tensor) -> Held:
        """The allocation behind a tensor. Raises torch.OutOfMemoryError for a new one beyond the budget."""
        storage = raw.untyped_storage()
        held = self._held.get(storage._cdata)
        if held is None:
            held = self._held[storage._cdata] = Held(self, storage.nbytes())
        return held


class Held:
    """One allocation on the device, which ends with the last tensor that refers to it."""

    def __init__(self, owner: Memory, size: int) -> None:
        self.owner, self.size = owner, 0
        if owner.allocated + size > owner.budget:
            raise torch.OutOfMemoryError(
                f"The practice accelerator is out of memory: tried to allocate {size:,} bytes; "
                f"{owner.allocated:,} of {owner.budget:,} are allocated."
            )
        self.size = size
        owner.allocated += size
        owner.peak = max(owner.peak, owner.allocated)

    def __del__(self) -> None:
        self.owner.allocated -= self.size


class Generator:
    """The state of the device's random numbers, which are those of a CPU generator."""

    def __init__(self) -> None:
        self.state = torch.Generator().get_state()

    def seed(self, seed: int) -> None:
        """Restart from a seed, as `torch.manual_seed` does with every device."""
        self.state = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """CPU kernels draw from this generator while the context is open."""
        before = torch.get_rng_state()
        torch.default_generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = torch.get_rng_state()
            torch.default_generator.set_state(before)


memory = Memory()
generator = Generator()


class PracticeTensor(Tensor):
    """A tensor on the practice accelerator: `raw` is the CPU tensor that has its numbers."""

    raw: Tensor
    held: Held

    @staticmethod
    def __new__(cls, raw: Tensor) -> PracticeTensor:
        held = memory.hold(raw)
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=memory.device
        )
        made.raw, made.held = raw, held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self, **_how: object) -> str:
        return f"PracticeTensor({self.raw!r})"

    def tolist(self) -> Any:
        """As of any tensor; torch has it for its own class only."""
        return self.raw.tolist()

    def data_ptr(self) -> int:
        """An address, which tells tensors of one allocation from those of another."""
        return self.raw.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The allocation, see `data_ptr`."""
        return self.raw.untyped_storage()

    @property
    def data(self) -> Tensor:
        """As of any tensor; assigned, it also takes over the numbers."""
        return Tensor.data.__get__(self)  # pyright: ignore (a descriptor)

    @data.setter
    def data(self, new: PracticeTensor) -> None:
        Tensor.data.__set__(self, new)  # pyright: ignore (a descriptor)
        self.raw, self.held = new.raw, new.held


def compute(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU tensors behind its arguments, with the rules of devices."""
    name = func._schema.name
    if name == "aten::scaled_dot_product_attention":
        return _attention(*args, **kwargs)
    if name == "aten::_thnn_fused_lstm_cell":
        return _lstm_cell(*args, **kwargs)
    # In inference mode, operators that consist of others arrive as they are.
    if torch.is_inference_mode_enabled() and (found := func.decompose(*args, **kwargs)) is not NotImplemented:
        return found
    refuse_mixed(func, args, kwargs)
    if name == "aten::copy_" and not isinstance(args[0], PracticeTensor):
        args[0].copy_(args[1].raw)
        return args[0]
    if name == "aten::_local_scalar_dense":
        return func(args[0].raw)
    device = kwargs.get("device")
    on_cpu = device is not None and torch.device(device).type == "cpu"
    given = {id(one.raw): one for one in tree_flatten((args, kwargs))[0] if isinstance(one, PracticeTensor)}
    raw_args, raw_kwargs = tree_map_only(PracticeTensor, lambda one: one.raw, (args, kwargs))
    if device is not None:
        raw_kwargs["device"] = "cpu"
    raw_kwargs.pop("pin_memory", None)
    with generator.drawing() if RANDOM in func.tags else contextlib.nullcontext():
        found = func(*raw_args, **raw_kwargs)
    if on_cpu:
        return found
    return tree_map_only(Tensor, lambda one: _same(given[id(one)], one) if id(one) in given else PracticeTensor(one), found)


def _same(given: PracticeTensor, raw: Tensor) -> PracticeTensor:
    """An argument that an operator returns, in the shape that it has now."""
    if given.shape != raw.shape or given.stride() != raw.stride():
        given.data = PracticeTensor(raw)
    return given


def refuse_mixed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError as a GPU does for CPU tensors among those of the device; single numbers may be read, not written."""
    flat = tree_flatten((args, kwargs))[0]
    if func._schema.name in MIXED or not any(isinstance(one, PracticeTensor) for one in flat):
        return
    written = {id(one) for one, argument in zip(args, func._schema.arguments, strict=False) if argument.is_write}
    for one in flat:
        if isinstance(one, Tensor) and one.device.type == "cpu" and (one.dim() > 0 or id(one) in written):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {memory.device} and cpu! ({func})"
            )


def _empty(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, memory_format: Any = None
) -> Tensor:
    return PracticeTensor(torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Tensor:
    return PracticeTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    ours = [one.raw if isinstance(one, PracticeTensor) else one for one in (source, target)]
    ours[1].copy_(ours[0])
    return target


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the operator that torch chooses on the CPU: fused where it can be, as on a GPU."""
    raw = [_on_cpu(one) for one in (query, key, value, attn_mask)]
    how = {"scale": scale, "enable_gqa": enable_gqa}
    learned_mask = attn_mask is not None and attn_mask.requires_grad
    with unset_fake_temporarily():
        choice = torch.ops.aten._fused_sdp_choice(*raw[:3], raw[3], dropout_p, is_causal, **how)
    if choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value and not enable_gqa and not learned_mask:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal, attn_mask=_float_mask(attn_mask, query), scale=scale)[0]
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, **how)[0]


def _lstm_cell(inputs: Tensor, hidden: Tensor, cell: Tensor, *biases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused operator that torch calls on every accelerator, and that CPUs lack; without gradient."""
    gates = sum(biases, inputs + hidden)
    come, forget, new, leave = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + come.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell, gates


def _on_cpu(one: Tensor | None) -> Tensor | None:
    """What torch's choice of an operator depends on; of a fake tensor its shape and format."""
    if not isinstance(one, FakeTensor):
        return one.raw if isinstance(one, PracticeTensor) else one
    with unset_fake_temporarily():
        return torch.empty(one.shape, dtype=one.dtype)


def _float_mask(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


# The operators that autocast computes in the lower precision on a CPU, as far as the student's network has them.
LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")


def _lowered(name: str) -> Callable[..., Any]:
    operator, key = getattr(torch.ops.aten, name).default, torch._C._dispatch_key_parse("AutocastPrivateUse1")

    def lowered(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        args, kwargs = tree_map_only(Tensor, lambda one: one.to(dtype) if one.dtype == torch.float32 else one, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return operator(*args, **kwargs)

    return lowered


class DeviceModule(types.ModuleType):
    """`torch.npu`: what torch, ComfyUI and this pack ask a device's module."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def is_bf16_supported(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # one for each process that torchrun starts

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """Nothing: torch's autograd knows one device of a backend in Python, so each process calls its own one 0."""

    def get_device_name(self, device: Any = None) -> str:
        return "practice accelerator"

    def synchronize(self, device: Any = None) -> None:
        """Nothing is queued."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return memory.budget - memory.allocated, memory.budget

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {f"{kind}_bytes.all.current": memory.allocated for kind in ("active", "reserved", "allocated")}

    def memory_allocated(self, device: Any = None) -> int:
        return memory.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return memory.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        memory.peak = memory.allocated

    def manual_seed(self, seed: int) -> None:
        generator.seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return generator.state.clone()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        generator.state = state.clone()


class PracticeGroup(dist.ProcessGroup):
    """The processes of a run, connected by gloo: it gets the CPU tensors behind those of the device."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue] (both are enough)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def _passed_on(self, name: str, *arguments: Any) -> Any:
        raw = tree_map_only(PracticeTensor, lambda one: one.raw, arguments)
        getattr(self._gloo, name)(*raw).wait()
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(arguments[0] if arguments else [])
        return torch._C._distributed_c10d._create_work_from_future(done)  # pyright: ignore

    def getBackendName(self) -> str:
        return "practice"


def _of_gloo(name: str) -> Callable[..., Any]:
    return lambda self, *arguments: self._passed_on(name, *arguments)


for _name in ("allreduce", "broadcast", "allgather", "barrier", "scatter", "_allgather_base"):
    setattr(PracticeGroup, _name, _of_gloo(_name))


def install(budget_bytes: int | None = None) -> None:
    """Make the practice accelerator this process's accelerator, with so much memory; once, before ComfyUI is imported."""
    set_budget(budget_bytes)
    _setup_privateuseone_for_python_backend(NAME, DeviceModule(f"torch.{NAME}"))
    memory.device = torch.device(NAME, 0)
    # Where two modules share a weight, they still do after `Module.to`, as with every other device.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # Pages of the CPU's memory are not locked for copies: a backend in Python cannot.
    torch.Tensor.pin_memory = lambda self, *_device: self  # pyright: ignore
    # ComfyUI takes a torch that was built for CUDA for one that has an NVIDIA GPU.
    torch.version.cuda = None
    vendor = types.ModuleType("torch_npu")
    vendor.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    vendor.npu_fusion_attention = vendor.npu_rotary_mul = None  # pyright: ignore (transformers imports these names)
    sys.modules["torch_npu"] = vendor
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", _attention, "PrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    dist.Backend.register_backend("practice", PracticeGroup, devices=[NAME])
    for name in LOWERED:
        library.impl(name, _lowered(name), "AutocastPrivateUse1")
    _libraries.extend((library, fallback))


def set_budget(budget_bytes: int | None) -> None:
    """Bound the device's memory from now on; None: 64 GB."""
    memory.budget = PLENTY_BYTES if budget_bytes is None else budget_bytes


def reset_peak() -> None:
    """Measure the peak from now on."""
    memory.peak = memory.allocated
