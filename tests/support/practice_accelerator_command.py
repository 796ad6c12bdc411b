"""A Python script with the practice accelerator: `python practice_accelerator_command.py SCRIPT ARGUMENTS`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    device = runpy.run_path(str(Path(__file__).with_name("practice_accelerator.py")), run_name="practice_accelerator")
    device["install"]()
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does with a script
    runpy.run_path(sys.argv[0], run_name="__main__")
