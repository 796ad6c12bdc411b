"""The CLIP-L file that gives the pooled vector: recognised, read and checked before anything is built."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
from torch import Tensor

from .errors import StudentFileError, listed
from .files import check_finite, read_header
from .layout import Shape

# Width and depth of the text half of OpenAI's CLIP ViT-L/14, which the host's own config fixes.
WIDTH, LAYERS, FEED_FORWARD = 768, 12, 3072
LAYER = "text_model.encoder.layers."
TABLES = ("text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight")


def is_clip_l(shapes: dict[str, Shape]) -> bool:
    """Whether tensor shapes are those of a CLIP-L text encoder (transformers' names)."""
    return shapes.get(f"{LAYER}0.mlp.fc1.weight") == (FEED_FORWARD, WIDTH) and f"{LAYER}{LAYERS}.mlp.fc1.weight" not in shapes


def in_order(first: str | None, second: str) -> tuple[str | None, str]:
    """CLIP-L's path and the student's, from two paths in either order, as DualCLIPLoader takes them; `first` may be None (no CLIP-L)."""
    if first is not None and _is_clip_l_file(second) and not _is_clip_l_file(first):
        return second, first
    return first, second


def _is_clip_l_file(path: str) -> bool:
    try:
        return is_clip_l(read_header(Path(path))[0])
    except StudentFileError:
        return False


def open_clip_l(path: Path) -> dict[str, Tensor]:
    """The tensors of a CLIP-L file. Raises StudentFileError if it is another kind of file or tensors are missing."""
    shapes, _, _ = read_header(path)
    if not is_clip_l(shapes):
        raise StudentFileError(
            f"{path.name} is not a CLIP-L text encoder.",
            "pick clip_l.safetensors in clip_name1, or none for a pooled vector of zeros.",
            f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:5])}",
        )
    missing = [name for name in _needed() if name not in shapes]
    if missing:
        raise StudentFileError(f"{path.name}: {len(missing)} tensors of CLIP-L are missing.", "download it again.", listed(missing))
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    check_finite({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}, path.name)
    return tensors


def _needed() -> list[str]:
    parts = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))]
    in_layers = [f"{LAYER}{layer}.{part}.{kind}" for layer in range(LAYERS) for part in parts for kind in ("weight", "bias")]
    return [*TABLES, *in_layers, "text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias"]
