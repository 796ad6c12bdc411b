"""The VAE of a diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils


def load_vae(path: Path) -> Any:
    """A VAE as ComfyUI's VAELoader loads it. Raises ValueError for a file that is not a VAE."""
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
    if vae.first_stage_model is None:
        raise ValueError(f"{path.name} is not a VAE that ComfyUI knows.\nWhat to do: name the VAE of the diffusion model.")
    return vae
