"""Files with the names of a Qwen3 that are not distilled Qwen3s."""

from __future__ import annotations

from collections.abc import Mapping

from ...runtime.errors import StudentFileError, UndistilledError
from .. import foreign
from ..kind import Shape
from ..projection import PROJECTION
from .layout import LAYERS, NAMED_SIZES, TOKEN_TABLE

PICK_STUDENT = foreign.PICK_STUDENT.format("Qwen3")
# The encoders that students replace, by width.
REPLACED = {NAMED_SIZES[size][0]: f"Qwen3-{size.upper()}" for size in ("4b", "8b")}


def refuse_relatives(shapes: Mapping[str, Shape], where: str, described: bool) -> None:
    """Raise StudentFileError for shapes (by distilled name) of another network; without metadata, of one without projection too."""
    if any("visual." in name for name in shapes):
        raise StudentFileError(
            f"{where} has vision layers: it is a Qwen3-VL, not a distilled Qwen3.",
            "load it with ComfyUI's own loader: image input stays with the large encoder; or " + PICK_STUDENT,
        )
    if f"{LAYERS}0.pre_feedforward_layernorm.weight" in shapes:
        raise StudentFileError(f"{where} is a Gemma 3, not a distilled Qwen3.", PICK_STUDENT)
    table = shapes.get(TOKEN_TABLE, ())
    if len(table) != 2 or described or any(name.startswith(PROJECTION) for name in shapes):
        return
    if table[1] in REPLACED:
        raise UndistilledError(
            f"{where} is a plain {REPLACED[table[1]]}, not a distilled Qwen3.",
            "load it with ComfyUI's own Load CLIP; Trim Text Encoder makes a smaller file of it, which is loaded here.",
        )
    raise StudentFileError(
        f"{where} is a Qwen3 of width {table[1]} without a projection (final_projection.0 and .3), not a distilled Qwen3.",
        "use the trained file with the projection; a plain Qwen3 of this size was not trained for this diffusion model.",
        f"It holds {len(shapes)} tensors, and no metadata that says distilled_t5.projection = none.",
    )
