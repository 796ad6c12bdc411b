"""Where the miniature's files lie: below one folder, in folders named as ComfyUI's, so that its lists and the trainer find them by name."""

from __future__ import annotations

from pathlib import Path

VAE_FILE, TEACHER_FILE, FLUX_FILE = "miniature_vae.safetensors", "miniature_teacher.safetensors", "miniature_flux.safetensors"
MODELS = {VAE_FILE: "vae", TEACHER_FILE: "text_encoders", FLUX_FILE: "diffusion_models"}
LORA_FILE = "miniature_palette_lora.safetensors"
KINDS = {**MODELS, LORA_FILE: "loras"}


def place(folder: Path, name: str) -> Path:
    """Where one of the files lies below `folder`."""
    return folder / KINDS[name] / name
