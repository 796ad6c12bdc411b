"""The dialects in which files name the tensors of a distilled T5, and the table that brings them to the published one.

published    encoder.shared.weight, encoder.encoder.block..., final_projection...      the authors' file, ours, their .pth
prefixless   shared.weight, encoder.block..., final_projection...                      CLIPSave, third-party conversions
module.      either of them behind `module.`                                           saved from DistributedDataParallel
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

WRAPPER = "module."
TOKEN_TABLE_TWIN = "encoder.encoder.embed_tokens.weight"

# First matching prefix wins: prefix in the prefixless dialect -> prefix in the published one.
PREFIXLESS = {
    "shared.": "encoder.shared.",
    "encoder.": "encoder.encoder.",
    "final_projection.": "final_projection.",
}

# What ComfyUI's own modules carry along and CLIPSave writes out; no part of the encoder.
LEFT_OUT = frozenset({"logit_scale"})


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Map each published name to the name that it has in the file. Names of no known dialect stay as they are, to be reported.

    The twin of the token table that some Hugging Face saves hold is kept under its own published name; `split_twin` takes it out.
    """
    found = list(names)
    wrapper = WRAPPER if found and all(name.startswith(WRAPPER) for name in found) else ""
    bare = {name.removeprefix(wrapper): name for name in found}
    if "shared.weight" in bare:
        bare = {_renamed(name): source for name, source in bare.items()}
    return {name: source for name, source in bare.items() if name not in LEFT_OUT}


def _renamed(name: str) -> str:
    for prefix, published in PREFIXLESS.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    return name


def split_twin(names: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """Take the duplicate of the token table out: the names without it, and the name it has in the file (None if it is not there)."""
    rest = dict(names)
    return rest, rest.pop(TOKEN_TABLE_TWIN, None)
