"""What dev.py finds: its folders below another one, and a folder that it accepts as a ComfyUI."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


def pretend_in(dev: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Move dev.py's folders below `folder`."""
    monkeypatch.setattr(dev, "DEV", folder / ".dev")
    monkeypatch.setattr(dev, "VENV", folder / ".venv")
    monkeypatch.setattr(dev, "TOOLS", folder / ".dev" / "tools")
    (folder / ".dev").mkdir()


def comfyui_folder(path: Path, version: str = "0.30.0") -> Path:
    """The smallest folder that dev.py accepts as a ComfyUI."""
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    (path / "comfyui_version.py").write_text(f'# generated\n__version__ = "{version}"\n')
    (path / "requirements.txt").write_text("torch\n")
    return path
