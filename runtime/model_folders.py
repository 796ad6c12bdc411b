"""The models shipped with the pack, in folders named as ComfyUI's, so that its lists and the trainer find them by name."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent.parent / "miniature" / "models"
KINDS = ("vae", "text_encoders", "diffusion_models", "loras")


def add_model_folders(folder: Path = SHIPPED) -> None:
    """Add the model folders in `folder` to ComfyUI's, after the user's own."""
    import folder_paths

    for kind in KINDS:
        if (folder / kind).is_dir():
            folder_paths.add_model_folder_path(kind, str(folder / kind))
