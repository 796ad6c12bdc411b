"""The values of a dumped recipe, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.toml import toml_value

# Keys whose values may be paths.
PATHS = ("t5", "clip_l", "clip_g", "cache", "file", "start", "vae", "path")


def leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Every value of a dumped recipe with its dotted key; an array of plain values is one value."""
    if isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}".lstrip("."))]
    return [(path, toml_value(value))]


def without_folders(value: Any, key: str = "") -> Any:
    """A dumped recipe in which absolute paths are cut to their file names."""
    if isinstance(value, dict):
        return {name: without_folders(part, name) for name, part in value.items()}
    if isinstance(value, tuple):
        return [without_folders(part) for part in value]
    return Path(value).name if key in PATHS and Path(value).is_absolute() else value
