"""What a node shows: images on it, and its text in the history."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor


def shown(image_NHW3: Tensor, text: str, cls: type[io.ComfyNode]) -> dict[str, Any]:
    """Pictures and text as the `ui` of a node."""
    return {**ui.PreviewImage(image_NHW3, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}


def image_of(picture: Any) -> Tensor:
    """An RGB image of PIL, or uint8 [H, W, 3], as ComfyUI's IMAGE, [1, H, W, 3] from 0 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def pictures_of(image_NHW3: Tensor) -> list[np.ndarray]:
    """ComfyUI's IMAGE as images, uint8 [H, W, 3], without alpha."""
    return list((image_NHW3[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
