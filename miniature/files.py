"""The miniature's files, and the folder of each, named as in ComfyUI so that its lists and the trainer find them by name."""

from __future__ import annotations

from pathlib import Path

VAE_FILE, TEACHER_FILE, FLUX_FILE = "miniature_vae.safetensors", "miniature_teacher.safetensors", "miniature_flux.safetensors"
LORA_FILE, SD3_FILE = "miniature_palette_lora.safetensors", "miniature_sd3.safetensors"
FOLDERS = {
    VAE_FILE: "vae",
    TEACHER_FILE: "text_encoders",
    FLUX_FILE: "diffusion_models",
    LORA_FILE: "loras",
    SD3_FILE: "diffusion_models",
}


def place(folder: Path, name: str) -> Path:
    """The path of one of the files below `folder`."""
    return folder / FOLDERS[name] / name
