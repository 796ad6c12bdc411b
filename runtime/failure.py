"""What the command says when it fails: a sentence for what the user can mend, and the whole story of what only we can.

Nothing is imported here but what every Python has: this is also for a Python that lacks the rest.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..train.recipe import Recipe

ADVICE = "What to do: "
ISSUES = "https://github.com/distilled-t5/distilled-t5/issues"
BUG = (
    f"\nThis is a fault of the trainer, not of what you gave it. The last checkpoint is whole.\n{ADVICE}report it at {ISSUES} with the "
    "command and the lines below."
)
# In lower case. torch, drivers and libraries say the first ones of a GPU, and torch the last two of a CPU (Linux, Windows).
OUT_OF_MEMORY = ("out of memory", "out_of_device_memory", "_status_alloc_failed", "can't allocate memory", "not enough memory: you tried")
# What these lack no package brings.
OURS_OR_THE_HOSTS = ("distilled_t5", "comfy", "folder_paths", "utils")


def explained(error: Exception, recipe: Recipe | None) -> str | None:
    """A sentence with advice about an expected failure; None for a bug, whose traceback is wanted."""
    if is_out_of_memory(error):
        return _out_of_memory(error, recipe)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS_OR_THE_HOSTS:
        return (
            f"This Python ({sys.executable}) has no package {error.name}.\n"
            f"{ADVICE}run the command with the Python that runs ComfyUI, or install ComfyUI's requirements.txt into this one."
        )
    if isinstance(error, (ValueError, OSError, RuntimeError)) and ADVICE in str(error):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}\n{ADVICE}see that the file or folder is there and may be read and written, and that its disk has room."
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the GPU or of the machine was not enough, as torch and Python say it."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in OUT_OF_MEMORY))


def _out_of_memory(error: Exception, recipe: Recipe | None) -> str:
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    lines = [f"The memory was not enough: {first}", "Checkpoints are whole; nothing half-written is left."]
    if recipe is None:
        return "\n".join([*lines, f"{ADVICE}close other programs, then run the same command again."])
    import comfy.model_management

    from ..train.memory import advice

    device = comfy.model_management.get_torch_device()
    total = comfy.model_management.get_total_memory(device)
    ways = advice(recipe, total, device.type != "cpu")
    first_try = (
        "go on with --resume (on a GPU with -- --reserve-vram 2, which keeps 2 GB more of it free). "
        "If that is not enough, a new run can start from the last student.safetensors"
    )
    return "\n".join([*lines, f"{ADVICE}{first_try} (student.start): {ways}"])
