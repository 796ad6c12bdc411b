"""What a distilled encoder's file says about itself beyond its tensors: reading, checking, writing.

All values are strings, as safetensors demands. `distilled_t5.*` keys are ours; `modelspec.*` keys follow ModelSpec 1.0.1, which
ComfyUI's Model Library and other hosts show. A file without `distilled_t5.format_version` is the authors': family flux, 256 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from ..families import FAMILIES
from ..runtime.errors import StudentFileError, printable
from ..students.t5.layout import StudentLayout

FORMAT_VERSION = "1"
AUTHORS_TOKEN_LENGTH = 256
# Beyond this the attention maps alone take gigabytes; no T5 student was trained anywhere near it.
MAX_TOKENS = 4096

KEY = "distilled_t5."
VERSION_KEY = KEY + "format_version"
HASH_KEY = "modelspec.hash_sha256"
# ModelSpec's hash is of the data alone: two tensors exchanged in the header, or fp16 written for bf16, would not be seen.
HEADER_HASH_KEY = KEY + "header_sha256"
# safetensors hold the hash of their own data: a value of the same length stands there until the data is written.
NO_HASH = "0x" + "0" * 64

PROJECTIONS = ("mlp", "none")
POOLED = ("clip_l", "zero")


@dataclass(frozen=True)
class StudentMetadata:
    """The checked metadata of one file.

    token_length: tokens that prompts were padded to in training. pooled: what stood for the pooled vector in training.
    text_width: set when the diffusion model's text input is not its family's usual width (a miniature). facts: every other string of the
    header, carried along when the encoder is saved again. sha256, header_sha256: what the data and the header must hash to, if it is known.
    """

    family: str = "flux"
    token_length: int = AUTHORS_TOKEN_LENGTH
    pooled: str = "clip_l"
    projection: str = "mlp"
    text_width: int | None = None
    title: str = ""
    sha256: str | None = None
    header_sha256: str | None = None
    described: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)


# What leads to the terms that bind whatever was made of these weights.
KEPT_WHEN_CHANGED = ("distilled_t5.diffusion_model",)
LICENCE_KEY = "modelspec.license"
CHANGED_KEY = KEY + "changed"


def of_changed_weights(metadata: StudentMetadata) -> StudentMetadata:
    """What may still be said when a LoRA or a merge has changed the weights: how to serve them, and whose terms bind them.

    Teacher, steps, recipe, title and author are those of a run that did not make these weights. The licence is that of the first file
    alone, since the host does not tell what was merged in: so it is told, and not claimed.
    """
    kept = {key: metadata.facts[key] for key in KEPT_WHEN_CHANGED if key in metadata.facts}
    licence = metadata.facts.get(LICENCE_KEY)
    told = "merged or patched after training" + (f"; licence of the first file: {licence}" if licence else "")
    return replace(metadata, title="", facts={**kept, CHANGED_KEY: told})


def read_metadata(header: Mapping[str, str] | None, where: str) -> StudentMetadata:
    """Check a safetensors header. Raises StudentFileError naming the key that says something impossible."""
    header = dict(header or {})
    if VERSION_KEY not in header:
        strays = sorted(key for key in header if key.startswith(KEY))
        if strays:
            raise _lie(where, strays[0], header[strays[0]], f"{VERSION_KEY} beside it")
        return StudentMetadata(title=header.get("modelspec.title", ""), sha256=_digest(header, HASH_KEY, where), facts=_facts(header))
    if header[VERSION_KEY] != FORMAT_VERSION:
        raise StudentFileError(
            f"{where} has format version {_quoted(header[VERSION_KEY])}; this version of Distilled T5 reads version {FORMAT_VERSION}.",
            "update the Distilled T5 pack, or download the file again.",
        )
    return StudentMetadata(
        family=_choice(header, KEY + "family", tuple(FAMILIES), "flux", where),
        token_length=_whole(header, KEY + "token_length", AUTHORS_TOKEN_LENGTH, 1, MAX_TOKENS, where),
        pooled=_choice(header, KEY + "pooled", POOLED, "clip_l", where),
        projection=_choice(header, KEY + "projection", PROJECTIONS, "mlp", where),
        text_width=_whole(header, KEY + "text_width", 0, 1, 1 << 20, where) if KEY + "text_width" in header else None,
        title=header.get("modelspec.title", ""),
        sha256=_digest(header, HASH_KEY, where),
        header_sha256=_digest(header, HEADER_HASH_KEY, where),
        described=True,
        facts=_facts(header),
    )


def check_against_layout(metadata: StudentMetadata, layout: StudentLayout, where: str) -> None:
    """Raise StudentFileError if the metadata and the tensors tell different stories, or the width is not the diffusion model's."""
    if layout.has_projection != (metadata.projection == "mlp"):
        found = "a projection" if layout.has_projection else "no projection"
        raise _lie(where, KEY + "projection", metadata.projection, f"what the tensors say ({found})")
    wanted = metadata.text_width or FAMILIES[metadata.family].text_width
    if layout.output_width != wanted:
        reason = f"its own metadata ({KEY}text_width)" if metadata.text_width else f"the type {metadata.family}"
        raise StudentFileError(
            f"{where} gives text embeddings of width {layout.output_width}, but {reason} asks for {wanted}.",
            "use a file that was distilled for this diffusion model.",
        )


def described(metadata: StudentMetadata, layout: StudentLayout, dtype: str) -> dict[str, str]:
    """The header to write: ours, ModelSpec's and the carried facts. The hashes are filled in by the writer."""
    ours = {
        VERSION_KEY: FORMAT_VERSION,
        KEY + "family": metadata.family,
        KEY + "token_length": str(metadata.token_length),
        KEY + "pooled": metadata.pooled,
        KEY + "projection": "mlp" if layout.has_projection else "none",
        HEADER_HASH_KEY: NO_HASH,
    }
    if layout.output_width != FAMILIES[metadata.family].text_width:
        ours[KEY + "text_width"] = str(layout.output_width)
    title = metadata.title or f"Distilled {layout.size_name} for {FAMILIES[metadata.family].display_name}"
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{FAMILIES[metadata.family].modelspec}/text-encoder",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.description": f"{layout.size_name} in the place of T5-XXL: {layout.parameters / 1e6:.0f} M parameters, {dtype}.",
        "modelspec.usage_hint": "ComfyUI: Distilled T5 Loader, beside clip_l.safetensors.",
        "modelspec.tags": "text encoder, t5, distilled, " + metadata.family,
        HASH_KEY: NO_HASH,
    }
    return {**metadata.facts, **spec, **ours, "format": "pt"}


# Written anew each time, so never carried over from the file that was loaded.
_REWRITTEN = re.compile(
    r"format|modelspec\.(sai_model_spec|architecture|implementation|title|date|description|usage_hint|tags|hash_sha256)"
    r"|distilled_t5\.(format_version|family|token_length|pooled|projection|text_width|header_sha256)"
)


def _facts(header: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in header.items() if not _REWRITTEN.fullmatch(key)}


def _choice(header: Mapping[str, str], key: str, allowed: tuple[str, ...], default: str, where: str) -> str:
    value = header.get(key, default)
    if value not in allowed:
        raise _lie(where, key, value, "one of " + ", ".join(allowed))
    return value


def _whole(header: Mapping[str, str], key: str, default: int, least: int, most: int, where: str) -> int:
    value = header.get(key, str(default))
    # isdecimal alone lets through digits of other scripts and numbers too long to parse.
    if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise _lie(where, key, value, f"a whole number from {least} to {most}")
    return int(value)


def _digest(header: Mapping[str, str], key: str, where: str) -> str | None:
    value = header.get(key)
    if value is None:
        return None
    if not re.fullmatch(r"(0x)?[0-9a-f]{64}", value.lower()):
        raise _lie(where, key, value, "64 hexadecimal digits")
    return value.lower().removeprefix("0x")


def _lie(where: str, key: str, value: str, expected: str) -> StudentFileError:
    return StudentFileError(
        f"{where}: its metadata says {printable(key)} = {_quoted(value)}, which cannot be: expected {expected}.",
        "download or export the file again; a file whose metadata is wrong is not loaded.",
    )


def _quoted(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
