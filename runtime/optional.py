"""Optional packages: imported when used; a missing one is an error with the command that installs it."""

from __future__ import annotations

import importlib
import sys
from typing import Any


def needed(module: str, package: str, what_for: str) -> Any:
    """The module, imported now. Raises ValueError with the pip command if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is installed, but a dependency of it is not
        raise ValueError(f"{what_for} needs the package {package}.\nWhat to do: {pip_install(package)}") from error


def pip_install(package: str) -> str:
    """The command that installs a package for this Python, which in a portable ComfyUI is not the one on PATH."""
    return f'run "{sys.executable}" -m pip install {package}'
