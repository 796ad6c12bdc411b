"""The start of a forked process, see `prepared.py`: it becomes `python ARGUMENTS` in FOLDER with ENVIRONMENT, and prints into OUTPUT."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch


def become(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Take over the folder, the environment, the output and the module path of a new Python, and run its script."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    of_python = (sys.prefix, sys.base_prefix)
    sys.path[:] = [entry for entry in sys.path if entry.startswith(of_python)]
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # which has read the variable when it was imported
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 (a program of a test)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


task: dict[str, Any] | None = globals().get("TASK")
if task is not None:
    become(**task)
