"""T5 files that are not distilled T5s."""

from __future__ import annotations

from collections.abc import Mapping

from ...runtime.errors import StudentFileError, UndistilledError
from .. import foreign
from ..kind import Shape
from ..projection import PROJECTION
from .layout import NAMED_SIZES, POSITION_BIAS, SHARED, T5_VOCABULARY

PICK_STUDENT = foreign.PICK_STUDENT.format("T5")
BIAS_OF_BLOCK_1 = POSITION_BIAS.replace("block.0", "block.1")
# Rows of the token table of networks whose tokens T5's tokenizer does not produce.
OTHER_VOCABULARIES = {384: "ByT5", 250112: "mT5"}


def refuse_relatives(shapes: Mapping[str, Shape], where: str, described: bool) -> None:
    """Raise StudentFileError for shapes (by published name) of another T5; without metadata, of one without projection too."""
    table = shapes.get(SHARED, ())
    if any(name.startswith(("decoder.block.", "encoder.decoder.block.")) for name in shapes):
        raise StudentFileError(
            f"{where} is a T5 with its decoder, not a distilled T5 encoder.",
            "only an encoder that was distilled for this diffusion model works here; " + PICK_STUDENT,
        )
    if table and BIAS_OF_BLOCK_1 in shapes:
        name = "a Pile-T5, AuraFlow's encoder" if table[0] == T5_VOCABULARY else "a umT5"
        raise StudentFileError(f"{where} is {name} (a position bias in every block), not a distilled T5.", PICK_STUDENT)
    if len(table) == 2 and table[0] in OTHER_VOCABULARIES:
        name = OTHER_VOCABULARIES[table[0]]
        raise StudentFileError(f"{where} has the vocabulary of {name} ({table[0]:,} pieces); it is not a distilled T5.", PICK_STUDENT)
    projected = any(name.startswith(PROJECTION) for name in shapes)
    if len(table) == 2 and POSITION_BIAS in shapes and not projected and not described:
        _refuse_unprojected(table[1], len(shapes), where)


def _refuse_unprojected(d_model: int, tensors: int, where: str) -> None:
    if d_model == NAMED_SIZES["xxl"][0]:
        loaders = "ComfyUI's own loader: Load CLIP, DualCLIPLoader or TripleCLIPLoader."
        raise UndistilledError(f"{where} is a plain T5-XXL, not a distilled T5.", f"load it with {loaders}")
    raise StudentFileError(
        f"{where} is a T5 of width {d_model} without a projection (final_projection.0 and .3), not a distilled T5.",
        "use the published or trained file with the projection; a plain T5 of this size was not trained for this diffusion model.",
        f"It holds {tensors} tensors, and no metadata that says distilled_t5.projection = none.",
    )
