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
TOKENS = 49408
# 77 in CLIP-L, 248 in the long CLIP that the host takes too.
POSITIONS = "text_model.embeddings.position_embedding.weight"


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
    """The tensors of a CLIP-L file. Raises StudentFileError for another kind of file, tensors missing, misshapen or not finite."""
    shapes, _, _ = read_header(path)
    if not is_clip_l(shapes):
        raise StudentFileError(
            f"{path.name} is not a CLIP-L text encoder.",
            "pick clip_l.safetensors in clip_name1, or none for a pooled vector of zeros.",
            f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:5])}",
        )
    needed = _needed() | {POSITIONS: (*shapes.get(POSITIONS, ())[:1], WIDTH)}
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise StudentFileError(f"{path.name}: {len(missing)} tensors of CLIP-L are missing.", "download it again.", listed(missing))
    wrong = [f"{name}: expected {list(shape)}, found {list(shapes[name])}" for name, shape in needed.items() if shapes[name] != shape]
    if wrong:
        raise StudentFileError(f"{path.name}: {len(wrong)} tensors of CLIP-L have a wrong shape.", "download it again.", listed(wrong))
    tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    check_finite({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}, path.name)
    return tensors


def _needed() -> dict[str, Shape]:
    """Every tensor that the host's CLIP-L has to be given, but for its positions."""
    shapes: dict[str, Shape] = {"text_model.embeddings.token_embedding.weight": (TOKENS, WIDTH)}
    square = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    for layer in (f"{LAYER}{number}." for number in range(LAYERS)):
        shapes |= {f"{layer}{part}.weight": (WIDTH, WIDTH) for part in square}
        shapes |= {f"{layer}mlp.fc1.weight": (FEED_FORWARD, WIDTH), f"{layer}mlp.fc2.weight": (WIDTH, FEED_FORWARD)}
        shapes |= {f"{layer}{part}.weight": (WIDTH,) for part in ("layer_norm1", "layer_norm2")}
        shapes |= {f"{layer}{part}.bias": (WIDTH,) for part in (*square, "mlp.fc2", "layer_norm1", "layer_norm2")}
        shapes[f"{layer}mlp.fc1.bias"] = (FEED_FORWARD,)
    return shapes | {f"text_model.final_layer_norm.{kind}": (WIDTH,) for kind in ("weight", "bias")}
