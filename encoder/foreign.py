"""What a file is, when it is no distilled T5: so that the message can say what to do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..runtime.errors import StudentFileError
from ..students.t5.layout import NAMED_SIZES, POSITION_BIAS, SHARED, Shape


@dataclass(frozen=True)
class ForeignKind:
    """A kind of file, the tensor-name fragments that give it away (any of them), and what a person should do with it."""

    name: str
    signs: tuple[str, ...]
    remedy: str


PICK_STUDENT = "pick the distilled T5 file here (README: which files to put where)."

# The first kind with a sign in any tensor name is named; order matters where kinds share signs.
KINDS = (
    ForeignKind(
        "a LoRA",
        (".lora_down.", ".lora_up.", "lora.down.", ".lora_A.", ".lora_B.", ".hada_w1_a", ".lokr_w1"),
        "load it with LoraLoader; " + PICK_STUDENT,
    ),
    ForeignKind(
        "a Flux diffusion model", ("double_blocks.0.", "single_transformer_blocks.0."), "load it with Load Diffusion Model; " + PICK_STUDENT
    ),
    ForeignKind("a checkpoint with a diffusion model", ("model.diffusion_model.",), "load it with Load Checkpoint; " + PICK_STUDENT),
    ForeignKind(
        "a CLIP text encoder",
        ("text_model.encoder.layers.0.", "transformer.resblocks.0."),
        "if it is CLIP-L, it belongs into clip_name1; " + PICK_STUDENT,
    ),
    ForeignKind("a CLIP vision model", ("vision_model.encoder.",), PICK_STUDENT),
    ForeignKind("a VAE", ("decoder.conv_in.", "decoder.up.0.", "taesd_decoder."), "load it with Load VAE; " + PICK_STUDENT),
    ForeignKind("a language model (Llama, Qwen, Gemma or the like)", ("model.layers.0.self_attn.",), PICK_STUDENT),
)

# Rows of the token tables of T5's relatives, whose tokens T5's tokenizer does not make.
OTHER_VOCABULARIES = {384: "a ByT5", 250112: "an mT5"}


def refuse_foreign(shapes: Mapping[str, Shape], where: str) -> None:
    """Raise StudentFileError if the tensor names (published dialect) are those of some other well-known kind of file."""
    if not shapes:
        raise StudentFileError(f"{where} holds no tensors.", "download the file again.")
    for kind in KINDS:
        if any(sign in name or name.startswith(sign) for sign in kind.signs for name in shapes):
            raise StudentFileError(f"{where} is {kind.name}, not a distilled T5.", kind.remedy)
    if any(name.startswith(("decoder.block.", "encoder.decoder.block.")) for name in shapes):
        raise StudentFileError(
            f"{where} is a whole T5 with its decoder, not a distilled T5 encoder.",
            "only an encoder that was distilled for this diffusion model works here; " + PICK_STUDENT,
        )
    _refuse_other_t5(shapes, where)


def _refuse_other_t5(shapes: Mapping[str, Shape], where: str) -> None:
    shape = shapes.get(SHARED)
    every_block_has_a_bias = "encoder.encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes
    if shape is not None and every_block_has_a_bias:
        raise StudentFileError(f"{where} is a umT5 (a position bias in every block), not a distilled T5.", PICK_STUDENT)
    if shape is not None and len(shape) == 2 and shape[0] in OTHER_VOCABULARIES:
        raise StudentFileError(
            f"{where} is {OTHER_VOCABULARIES[shape[0]]} (a vocabulary of {shape[0]:,} pieces), not a distilled T5.", PICK_STUDENT
        )


def refuse_unprojected(shapes: Mapping[str, Shape], where: str) -> None:
    """Raise StudentFileError for a T5 without projection, of which no metadata says that this is meant."""
    if any(name.startswith("final_projection.") for name in shapes) or POSITION_BIAS not in shapes or len(shapes.get(SHARED, ())) != 2:
        return
    d_model = shapes[SHARED][1]
    if d_model == NAMED_SIZES["xxl"][0]:
        raise StudentFileError(
            f"{where} is a plain T5-XXL, not a distilled T5.",
            "load it with DualCLIPLoader (type flux), which is made for it; a distilled T5 goes here.",
        )
    raise StudentFileError(
        f"{where} is a T5 of width {d_model} without its projection (final_projection.0 and .3), so it is no distilled T5.",
        "use the file with the projection, as it was published or trained; a plain T5 of this size was never taught this diffusion model.",
        f"It holds {len(shapes)} tensors, and no metadata that says distilled_t5.projection = none.",
    )
