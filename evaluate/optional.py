"""Packages that only a metric needs: imported when it is used; a missing one is an error with the command that installs it."""

from __future__ import annotations

import importlib
from typing import Any

from ..train.corpora import pip_install


def needed(module: str, package: str, what_for: str) -> Any:
    """The module, imported now. Raises ValueError with the pip command if its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, and something that it needs itself is not
        raise ValueError(f"{what_for} needs the package {package}.\nWhat to do: {pip_install(package)}") from error
