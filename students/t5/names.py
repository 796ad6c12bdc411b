"""The names under which files hold the tensors of a distilled T5.

published    encoder.shared.weight, encoder.encoder.block..., final_projection...      the authors' file and ours
prefixless   shared.weight, encoder.block..., final_projection...                      CLIPSave, third-party conversions
in a CLIP    text_encoders.t5base.transformer. before prefixless names                 CheckpointSave, beside the other models
module.      either of them behind `module.`                                           saved from DistributedDataParallel
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# The attribute of ComfyUI's text model. CLIPSave writes a file of its own for a module of this name, and LoRAs for T5-XXL, which look for
# t5xxl, do not find it.
MODULE = "t5base"
IN_CLIP = re.compile(rf"(text_encoders\.)?{MODULE}\.transformer\.")
WRAPPER = "module."
# kohya and OneTrainer (lora_te2_, lora_te3_), LyCORIS (lycoris_te2_), ComfyUI's generic names (text_encoders.t5xxl.), diffusers
# (text_encoder_2.), PEFT (base_model.model.) and bare names (te2., t5.): all for the T5-XXL of Flux or SD3.
LORA_KEYS = (
    r"(base_model\.model\.)?((lora|lycoris)[._])?"
    r"((text_encoders\.)?t5(_?xxl)?[._]"
    r"|(te|text_encoders?)(_?\d)?[._](transformer[._])?(encoder[._](block|final_layer_norm|embed_tokens)|shared)[._])"
)
# A duplicate of the token table that some Hugging Face files hold.
TOKEN_TABLE_TWIN = "encoder.encoder.embed_tokens.weight"
# The first matching prefix counts: prefix in the prefixless dialect -> published prefix.
PREFIXLESS = {"shared.": "encoder.shared.", "encoder.": "encoder.encoder.", "final_projection.": "final_projection."}
# ComfyUI's text models hold it and CLIPSave writes it; it is not part of the encoder.
LEFT_OUT = frozenset({"logit_scale"})


def published_names(names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Published name -> name in the file, and the file's name of the duplicate token table (None without one).

    Unknown names stay as they are, to be reported; in a checkpoint, those of other models are left out.
    """
    found = list(names)
    bare = {IN_CLIP.sub("", name, count=1): name for name in found if IN_CLIP.match(name)}
    if not bare:
        wrapper = WRAPPER if found and all(name.startswith(WRAPPER) for name in found) else ""
        bare = {name.removeprefix(wrapper): name for name in found}
    if "shared.weight" in bare:
        bare = {_published(name): source for name, source in bare.items()}
    known = {name: source for name, source in bare.items() if name not in LEFT_OUT}
    twin = known.pop(TOKEN_TABLE_TWIN, None)
    return known, twin


def _published(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXLESS if name.startswith(prefix)), "")
    return PREFIXLESS.get(prefix, "") + name.removeprefix(prefix)
