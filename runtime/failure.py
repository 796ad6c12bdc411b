"""What a command says when it fails: a sentence with advice for an expected failure, a traceback for a bug.

Imports the standard library alone: this must also run in a Python that lacks the packages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

ADVICE = "What to do: "
ISSUES = "https://github.com/distilled-t5/distilled-t5/issues"
# In lower case, as torch, drivers and libraries for a GPU say it; torch, for CPU memory (Linux, Windows); systems, for a file that they
# cannot map (Linux and macOS, Windows).
OUT_OF_MEMORY = (
    *("out of memory", "out_of_device_memory", "_status_alloc_failed", "can't allocate memory", "not enough memory: you tried"),
    *("cannot allocate memory", "(os error 12)", "(os error 1455)", "paging file is too small", "not enough memory resources"),
)
DRIVER = re.compile(r"\b(CUDA|CUDNN|CUBLAS|HIP|XPU|driver)\b", re.IGNORECASE)
# Modules that no package provides.
NOT_PACKAGES = ("distilled_t5", "comfy", "folder_paths", "utils")


def explained(error: Exception, memory_advice: Callable[[], str] | None = None) -> str | None:
    """A sentence with advice for an expected failure; None for a bug. `memory_advice` says what needs less memory."""
    if is_out_of_memory(error):
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        advice = memory_advice() if memory_advice else "close other programs, then run the same command again."
        return f"Out of memory: {first}\nCheckpoints are complete; no partly written file is left.\n{ADVICE}{advice}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in NOT_PACKAGES:
        return (
            f"This Python ({sys.executable}) has no package {error.name}.\n"
            f"{ADVICE}run the command with the Python that runs ComfyUI, or install ComfyUI's requirements.txt into this one."
        )
    if isinstance(error, (ValueError, OSError, RuntimeError)) and ADVICE in str(error):
        return str(error)
    # Libraries in Rust, such as safetensors, report an error of the operating system as text.
    if isinstance(error, OSError) or "(os error " in str(error):
        temporary = " TMPDIR names the folder for temporary files." if "temporary directory" in str(error) else ""
        return f"{error}\n{ADVICE}check that the file or folder exists, its permissions, and the free space of its disk.{temporary}"
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the GPU or of the machine was not sufficient, as torch and Python report it."""
    # The safetensors library is not imported here.
    reports = isinstance(error, (RuntimeError, OSError)) or type(error).__name__ == "SafetensorError"
    return isinstance(error, MemoryError) or (reports and any(sign in str(error).lower() for sign in OUT_OF_MEMORY))


def is_of_the_driver(error: Exception, path: str = "") -> bool:
    """Whether an error while the file `path` was loaded is one of the GPU's driver or libraries."""
    return isinstance(error, RuntimeError) and DRIVER.search(str(error).replace(path, "")) is not None
