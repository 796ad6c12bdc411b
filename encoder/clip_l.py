"""The CLIP-L file of the pooled vector: recognised, read and checked before anything is built."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
from torch import Tensor

from ..runtime.errors import StudentFileError
from ..runtime.progress import Progress, silent, waiting
from ..runtime.weights import check_finite, load_tensors, read_header, widest_float
from .needed_tensors import OPENAI, check_clip_l, naming_of


def in_order(first: str | None, second: str) -> tuple[str | None, str]:
    """CLIP-L's path and the student's, from two paths in either order, as DualCLIPLoader takes them; `first` may be None (no CLIP-L)."""
    if first is not None and not _is_clip_l_file(first) and _is_clip_l_file(second):
        return second, first
    return first, second


def _is_clip_l_file(path: str) -> bool:
    try:
        return naming_of(read_header(Path(path))[0]) is not None
    except StudentFileError:
        return False


def open_clip_l(path: Path, progress: Progress = silent) -> dict[str, Tensor]:
    """The tensors of a CLIP-L file by transformers' names.

    Raises StudentFileError for another kind of file, for a quantised one, and for tensors that are missing, misshapen or not finite.
    Tensors that CLIP-L does not use are ignored.
    """
    shapes, dtypes, _ = read_header(path)
    naming = check_clip_l(shapes, path.name)
    needed = naming.needed(shapes)
    widest_float({name: dtypes[name] for name in needed}, path.name)
    tensors = load_tensors(path, needed, waiting(progress, len(needed)))
    check_finite(tensors, path.name, progress)
    if naming is OPENAI:
        return comfy.utils.clip_text_transformers_convert(tensors, "", "")
    # Old files of CLIPSave, whose projection ComfyUI's own loader transposes as well.
    turned = {"text_projection.weight": tensors["text_projection"].transpose(0, 1)} if "text_projection" in tensors else {}
    return {name: tensor for name, tensor in tensors.items() if name != "text_projection"} | turned
