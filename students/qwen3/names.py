"""The names under which files hold the tensors of a Qwen3, distilled or not.

distilled    encoder.layers..., encoder.norm.weight, final_projection...         ours
published    model.layers..., model.norm.weight, lm_head.weight                  Hugging Face's and ComfyUI's files of the language model
bare         layers..., norm.weight                                              saved from transformers' Qwen3Model
in a CLIP    text_encoders.qwen3base.transformer. before distilled names         CheckpointSave; CLIPSave without text_encoders.
module.      any of them behind `module.`                                        saved from DistributedDataParallel
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The attribute of ComfyUI's text model. LoRAs for the large encoder, which look for qwen3_4b, do not find it.
MODULE = "qwen3base"
IN_CLIP = re.compile(rf"(text_encoders\.)?{MODULE}\.transformer\.")
WRAPPER = "module."
# ComfyUI's generic names (text_encoders.qwen3_4b.), kohya's (lora_te_layers_), diffusers' and PEFT's (text_encoder.model.layers.).
LORA_KEYS = (
    r"(base_model\.model\.)?((lora|lycoris)[._])?"
    r"((text_encoders\.)?qwen3_\w+\.|(te|text_encoders?)(_?\d)?[._](transformer[._])?(model[._])?(layers|embed_tokens|norm)[._])"
)
# The first matching beginning counts.
BEGINNINGS = {"model.": "encoder.", **{name: f"encoder.{name}" for name in ("layers.", "embed_tokens.", "norm.")}}
# The head of the language model, and what ComfyUI's text models hold and CLIPSave writes: not part of the encoder.
LEFT_OUT = re.compile(r"(model\.)?lm_head\.weight|logit_scale")


def published_names(names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Distilled name -> name in the file, and None: these files hold no duplicate of the token table.

    Unknown names stay as they are, to be reported; in a checkpoint, those of other models are left out.
    """
    found = list(names)
    bare = {IN_CLIP.sub("", name, count=1): name for name in found if IN_CLIP.match(name)}
    if not bare:
        wrapper = WRAPPER if found and all(name.startswith(WRAPPER) for name in found) else ""
        bare = {name.removeprefix(wrapper): name for name in found}
    return {_distilled(name): source for name, source in bare.items() if not LEFT_OUT.fullmatch(name)}, None


def _distilled(name: str) -> str:
    beginning = next((beginning for beginning in BEGINNINGS if name.startswith(beginning)), "")
    return BEGINNINGS.get(beginning, "") + name.removeprefix(beginning)
