"""Commands of the pack in processes forked from one that has imported torch and transformers, which would take each of them seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import tempfile
from collections.abc import Sequence
from pathlib import Path

HEAVY = ["torch", "torchvision", "transformers.models.t5.modeling_t5", "safetensors.torch", "pydantic", "einops", "scipy.stats"]
FORKED_COMMAND = Path(__file__).with_name("forked_command.py")


def run_prepared(arguments: Sequence[str], folder: Path, timeout_s: float, **extra: str) -> tuple[int, str]:
    """Run `python ARGUMENTS` in `folder` to its end, with `extra` environment variables; its exit status and output.

    The first argument is a script, a folder with a `__main__.py`, or `-c`, followed by a program. TimeoutError if it takes longer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with tempfile.NamedTemporaryFile(suffix=".txt") as output:
        task = {"arguments": [*arguments], "folder": str(folder), "environment": {**os.environ, **extra}, "output": output.name}
        process = context.Process(target=runpy.run_path, args=(str(FORKED_COMMAND), {"TASK": task}))
        process.start()
        try:
            process.join(timeout_s)
            if process.exitcode is None:
                raise TimeoutError(f"{' '.join(arguments)} takes longer than {timeout_s:.0f} s")
        finally:
            process.kill()
            process.join()
        return process.exitcode, Path(output.name).read_text(encoding="utf-8", errors="replace")
