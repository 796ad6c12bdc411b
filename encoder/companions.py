"""The files of the encoders beside the large one, CLIP-L and CLIP-G: recognised, read and checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.utils
from torch import Tensor

from ..families.family import Family
from ..runtime.errors import StudentFileError, printable
from ..runtime.progress import Progress, silent, waiting
from ..runtime.weights import check_finite, load_tensors, read_header, widest_float
from .needed_tensors import CLIPS, check_companion, naming_of


def in_order(companions: Mapping[str, str | None], student: str) -> tuple[dict[str, str], str]:
    """The paths of companions by what they are, and the student's path, of paths given in any order, as ComfyUI's own loaders take them.

    A file that is not a companion stays under the name that it was given. None means that there is no file.
    """
    given = {name: path for name, path in companions.items() if path is not None}
    if _companion_in(student) is not None:
        swapped = next((name for name, path in given.items() if _companion_in(path) is None), None)
        if swapped is not None:
            given[swapped], student = student, given[swapped]
    return {_companion_in(path) or name: path for name, path in given.items()}, student


def taken_by(family: Family, companions: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The companions that a family can use, and a line about those that it ignores: all, where it takes none, as PixArt and Chroma.

    The loader's list starts with CLIP-L, so a workflow for these families names one without meaning it.
    """
    if family.companions or not companions:
        return dict(companions), ""
    files = " and ".join(printable(Path(path).name) for path in companions.values())
    return {}, f"not used: {files}, because {family.display_name} takes {family.kind.display_name} alone"


def _companion_in(path: str) -> str | None:
    try:
        shapes = read_header(Path(path))[0]
    except StudentFileError:
        return None
    return next((name for name in CLIPS if naming_of(shapes, name) is not None), None)


def open_companion(name: str, path: Path, progress: Progress = silent) -> dict[str, Tensor]:
    """The tensors of a CLIP file by transformers' names.

    Raises StudentFileError for another kind of file, for a quantised one, and for tensors that are missing, misshapen or not finite.
    Tensors that the CLIP does not use are ignored.
    """
    shapes, dtypes, _ = read_header(path)
    naming = check_companion(shapes, path.name, name)
    needed = naming.needed(shapes)
    widest_float({name: dtypes[name] for name in needed}, path.name)
    tensors = load_tensors(path, needed, waiting(progress, len(needed)))
    check_finite(tensors, path.name, progress)
    if naming.converted:
        return comfy.utils.clip_text_transformers_convert(tensors, "", "")
    # Old files of CLIPSave, whose projection ComfyUI's own loader transposes as well.
    turned = {"text_projection.weight": tensors["text_projection"].transpose(0, 1)} if "text_projection" in tensors else {}
    return {name: tensor for name, tensor in tensors.items() if name != "text_projection"} | turned
