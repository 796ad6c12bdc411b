"""The models shipped with the pack, in folders named as ComfyUI's, so that its lists and the trainer find them by name."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent.parent / "miniature" / "models"


def add_model_folders(folder: Path = SHIPPED) -> None:
    """Add the model folders in `folder` to ComfyUI's, after the user's own."""
    import folder_paths

    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            folder_paths.add_model_folder_path(path.name, str(path))
