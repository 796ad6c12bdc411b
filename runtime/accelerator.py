"""The accelerator that torch finds, of any type: "cuda" (NVIDIA and AMD), "xpu" (Intel), "mps" (Apple), "npu" (Ascend) and others."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import TypeVar

import torch

Result = TypeVar("Result")


def accelerator_type() -> str | None:
    """The type of this machine's accelerator, such as "cuda"; None without one."""
    if hasattr(torch, "accelerator"):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return None if found is None else found.type
    # torch before 2.6
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None


def module_of(device_type: str | None) -> ModuleType | None:
    """torch's module for a type of accelerators; None for the CPU, for DirectML, which has none, and for None."""
    return None if device_type in (None, "cpu") else getattr(torch, device_type, None)


def counting_module() -> ModuleType | None:
    """The module of this process's accelerator, if it counts memory and is in use: with ComfyUI's --cpu it is not."""
    module = module_of(accelerator_type())
    return module if module is not None and hasattr(module, "max_memory_allocated") and module.is_initialized() else None


def device_name(device: str) -> str:
    """The product's name of a device such as cuda:0, or the device itself where torch does not tell."""
    module = module_of(torch.device(device).type)
    return module.get_device_name(device) if module is not None and hasattr(module, "get_device_name") else device


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Wall-clock seconds of some work, what is queued on the device included, and its result."""
    module = module_of(device.type)
    which = () if device.type == "mps" else (device,)
    wait = (lambda *_: None) if module is None else module.synchronize
    wait(*which)
    begin = time.perf_counter()
    result = work()
    wait(*which)
    return time.perf_counter() - begin, result
