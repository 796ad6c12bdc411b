"""What a weight file is when it is not a student, so that the message can say what to do with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..runtime.errors import StudentFileError
from .kind import Shape, StudentKind


@dataclass(frozen=True)
class ForeignKind:
    """A kind of file, parts of tensor names that identify it (any of them), and where it belongs."""

    name: str
    signs: tuple[str, ...]
    belongs: str = ""


PICK_STUDENT = "pick the distilled {} file here (README: Install)."
# The first kind with a sign in any tensor name is named; order matters where kinds share signs.
KINDS = (
    ForeignKind(
        "a LoRA",
        (".lora_down.", ".lora_up.", "lora.down.", ".lora_A.", ".lora_B.", ".hada_w1_a", ".lokr_w1"),
        "load it with LoraLoader; ",
    ),
    ForeignKind(
        "a ControlNet",
        ("controlnet_blocks.", "controlnet_cond_embedding.", "control_model.", "controlnet.0."),
        "load it with Load ControlNet Model; ",
    ),
    ForeignKind("a diffusion model", ("double_blocks.0.", "single_transformer_blocks.0."), "load it with Load Diffusion Model; "),
    ForeignKind("a checkpoint with a diffusion model", ("model.diffusion_model.",), "load it with Load Checkpoint; "),
    ForeignKind(
        "a CLIP text encoder",
        ("text_model.encoder.layers.0.", "transformer.resblocks.0."),
        "if it is CLIP-L, pick it as the CLIP-L file (clip_name1); ",
    ),
    ForeignKind("a CLIP vision model", ("vision_model.encoder.",)),
    ForeignKind("a VAE", ("decoder.conv_in.", "decoder.up.0.", "taesd_decoder."), "load it with Load VAE; "),
    ForeignKind("a language model (Llama, Qwen, Gemma or the like)", ("model.layers.0.self_attn.",)),
)
# Kinds that have tensor names of the diffusion model that they are used with.
ADDED_TO_A_MODEL = {"a LoRA", "a ControlNet"}
# Endings of tensor names that quantisation adds -> what it is called. The first that is found counts.
QUANTISED = {
    ".weight_scale_2": "NVFP4",
    ".scale_weight": "scaled fp8",
    ".scale_input": "scaled fp8",
    ".weight_scale": "scaled fp8 or int8",
    ".comfy_quant": "ComfyUI's quantised layers",
    "bitsandbytes__nf4": "bitsandbytes NF4",
    "bitsandbytes__fp4": "bitsandbytes FP4",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ or AWQ",
    ".weight._data": "quanto",
}


def foreign_kind(names: Collection[str], kind: StudentKind) -> ForeignKind | None:
    """The well-known kind of file that has such tensor names, unless they are those of a student of this kind."""
    ours = any(name.endswith(kind.signs) for name in names)
    for foreign in KINDS:
        # A kind of student may have the names of a language model.
        signs = [sign for sign in foreign.signs if not (ours and any(sign in own for own in kind.signs))]
        if any(sign in name for sign in signs for name in names):
            return foreign
    return None


def refuse_foreign(shapes: Mapping[str, Shape], where: str, kind: StudentKind) -> None:
    """Raise StudentFileError if the tensor names are those of some other well-known kind of file than a student of this kind."""
    if not shapes:
        raise StudentFileError(f"{where} holds no tensors.", "download the file again.")
    foreign = foreign_kind(shapes, kind)
    if foreign is not None:
        student = kind.display_name
        raise StudentFileError(f"{where} is {foreign.name}, not a distilled {student}.", foreign.belongs + PICK_STUDENT.format(student))


def refuse_quantised(names: Iterable[str], where: str, remedy: str) -> None:
    """Raise StudentFileError if tensor names show that weights are quantised with scales beside them, which are not applied here."""
    endings = {ending: how for name in names for ending, how in QUANTISED.items() if name.endswith(ending)}
    if endings:
        how = next(how for ending, how in QUANTISED.items() if ending in endings)
        raise StudentFileError(f"{where} is quantised ({how}); expected plain weights (fp32, bf16, fp16 or fp8 without scales).", remedy)
