"""The metadata of an encoder file: what its tensors do not tell. Read, checked and written.

All values are strings, as safetensors requires. `distilled_t5.*` keys are ours; `modelspec.*` keys follow ModelSpec 1.0.1, which
ComfyUI's Model Library shows. A file without `distilled_t5.format_version` is read as the authors': with the defaults of StudentMetadata.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from ..families import DEFAULT, FAMILIES
from ..families.family import Family
from ..runtime.errors import StudentFileError, printable
from ..students.kind import Layout

FORMAT_VERSION = "1"
# Beyond this the attention maps alone take gigabytes; no student was trained at such a length.
MAX_TOKENS = 4096

KEY = "distilled_t5."
VERSION_KEY = KEY + "format_version"
ALSO_KEY = KEY + "also_serves"
HASH_KEY = "modelspec.hash_sha256"
# ModelSpec's hash covers the data alone: it misses two tensors swapped in the header, or fp16 written for bf16.
HEADER_HASH_KEY = KEY + "header_sha256"
# The family for which a large encoder's file was trimmed (`encoder.trim`).
TRIMMED_KEY = KEY + "trimmed_for"
# A placeholder of the same length, until the data is written and its hash is known.
NO_HASH = "0x" + "0" * 64

PROJECTIONS = ("mlp", "none")
ZERO = "zero"
MOST_WIDTH = 1 << 20


@dataclass(frozen=True)
class StudentMetadata:
    """The checked metadata of one file.

    token_length: tokens to which prompts were padded in training. pooled: the companions that gave the pooled vector in training, joined by
    +, or zero. also_serves: the other families that the encoder serves. text_width: set when it is not the family's (a miniature).
    described: whether the file has metadata of ours. facts: every other string of the header, kept when the encoder is saved again. sha256,
    header_sha256: the expected hashes of data and header, where known.
    """

    family: str = DEFAULT.name
    token_length: int = DEFAULT.token_length
    pooled: str = "clip_l"
    projection: str = "mlp"
    also_serves: tuple[str, ...] = ()
    text_width: int | None = None
    title: str = ""
    sha256: str | None = None
    header_sha256: str | None = None
    described: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def families(self) -> tuple[str, ...]:
        """Every family that the encoder serves."""
        return (self.family, *self.also_serves)


# The model whose licence covers whatever is made of these weights.
KEPT_WHEN_CHANGED = (KEY + "diffusion_model",)
LICENCE_KEY = "modelspec.license"
CHANGED_KEY = KEY + "changed"


def of_changed_weights(metadata: StudentMetadata) -> StudentMetadata:
    """The metadata after a LoRA or a merge has changed the weights: how to serve them, and which licence covers them.

    Teacher, steps, recipe, title and author describe a run that did not produce these weights. The licence is the first file's alone, as
    ComfyUI does not tell what was merged in, so it goes into the description of the change.
    """
    kept = {key: metadata.facts[key] for key in KEPT_WHEN_CHANGED if key in metadata.facts}
    licence = metadata.facts.get(LICENCE_KEY)
    change = "merged or patched after training" + (f"; licence of the first file: {licence}" if licence else "")
    return replace(metadata, title="", facts={**kept, CHANGED_KEY: change})


def read_metadata(header: Mapping[str, str], where: str) -> StudentMetadata:
    """Check the metadata of a safetensors header. Raises StudentFileError that names the key with an invalid value."""
    facts = {key: value for key, value in header.items() if not REWRITTEN.fullmatch(key)}
    common = StudentMetadata(title=header.get("modelspec.title", ""), sha256=_digest(header, HASH_KEY, where), facts=facts)
    if VERSION_KEY not in header:
        strays = sorted(key for key in header if key.startswith(KEY))
        if strays:
            raise _wrong(where, strays[0], header[strays[0]], f"{VERSION_KEY} beside it")
        return common
    if header[VERSION_KEY] != FORMAT_VERSION:
        raise StudentFileError(
            f"{where} has format version {_quoted(header[VERSION_KEY])}; this version of Distilled T5 reads version {FORMAT_VERSION}.",
            "update the Distilled T5 pack, or download the file again.",
        )
    family = FAMILIES[_choice(header, KEY + "family", (DEFAULT.name, *FAMILIES), where)]
    width = _integer(header, KEY + "text_width", family.text_width, MOST_WIDTH, where)
    return replace(
        common,
        family=family.name,
        also_serves=_also_serves(header, family, where),
        token_length=_integer(header, KEY + "token_length", family.token_length, MAX_TOKENS, where),
        pooled=_choice(header, KEY + "pooled", _pooled(family), where),
        projection=_choice(header, KEY + "projection", PROJECTIONS, where),
        text_width=width if KEY + "text_width" in header else None,
        header_sha256=_digest(header, HEADER_HASH_KEY, where),
        described=True,
    )


def _also_serves(header: Mapping[str, str], family: Family, where: str) -> tuple[str, ...]:
    """The other families of a file. Raises StudentFileError for one with another teacher or padding."""
    value = header.get(ALSO_KEY, "")
    names, others = tuple(value.split(", ")) if value else (), alike(family)
    if not set(names) <= set(others):
        raise _wrong(where, ALSO_KEY, value, f"some of the families with the same teacher and padding ({', '.join(others) or 'none'})")
    return names


def alike(family: Family) -> tuple[str, ...]:
    """The other families with the same teacher, which pad its text or do not, too: an encoder can serve them as well."""
    same = (family.teacher, family.text_width, family.padded)
    return tuple(one.name for one in FAMILIES.values() if one != family and (one.teacher, one.text_width, one.padded) == same)


def served_as(metadata: StudentMetadata, family: Family, where: str) -> StudentMetadata:
    """The metadata of a file that is served for a family. Raises StudentFileError if it does not say that it serves this one."""
    families = metadata.families
    if family.name not in families:
        names = " and ".join(FAMILIES[name].display_name for name in families)
        raise StudentFileError(
            f"{where} was distilled for {names}; the type is {family.name}.", f"set type to {' or '.join(families)}, or pick another file."
        )
    pooled = "+".join(name for name in metadata.pooled.split("+") if name in family.companions) or ZERO
    others = tuple(name for name in families if name != family.name)
    return replace(metadata, family=family.name, also_serves=others, pooled=pooled)


def _pooled(family: Family) -> tuple[str, ...]:
    """What can be the pooled vector of a family, all of its companions first."""
    names = list(family.companions)
    subsets = [part for count in range(len(names), 0, -1) for part in itertools.combinations(names, count)]
    return (*map("+".join, subsets), ZERO)


def of_kind(metadata: StudentMetadata, layout: Layout) -> StudentMetadata:
    """The metadata; where a file has none, that of the first family which its kind of network serves and whose text is as wide."""
    if metadata.described or layout.kind in FAMILIES[metadata.family].students:
        return metadata
    fitting = (family for family in FAMILIES.values() if layout.kind in family.students and family.text_width == layout.output_width)
    family = next(fitting, FAMILIES[metadata.family])
    return replace(metadata, family=family.name, token_length=family.token_length, pooled=_pooled(family)[0])


def check_against_layout(metadata: StudentMetadata, layout: Layout, where: str) -> None:
    """Raise StudentFileError if metadata and tensors disagree, the kind is not one of the family's, or the width is not."""
    if layout.kind not in FAMILIES[metadata.family].students:
        raise _wrong(where, KEY + "family", metadata.family, f"a family that a {layout.size_name} can serve")
    if layout.has_projection != (metadata.projection == "mlp"):
        found = "a projection" if layout.has_projection else "no projection"
        raise _wrong(where, KEY + "projection", metadata.projection, f"{_projection(layout)} (the tensors have {found})")
    wanted = metadata.text_width or FAMILIES[metadata.family].text_width
    if layout.output_width != wanted:
        reason = f"its own metadata ({KEY}text_width)" if metadata.text_width else f"the type {metadata.family}"
        raise StudentFileError(
            f"{where} gives text embeddings of width {layout.output_width}; {reason} requires {wanted}.",
            "use a file that was distilled for this diffusion model.",
        )


def _projection(layout: Layout) -> str:
    return "mlp" if layout.has_projection else "none"


def described(metadata: StudentMetadata, layout: Layout, dtype: str) -> dict[str, str]:
    """The header to write: our keys, ModelSpec's and the other facts. The writer fills in the hashes."""
    family = FAMILIES[metadata.family]
    ours = {
        VERSION_KEY: FORMAT_VERSION,
        KEY + "family": metadata.family,
        **({ALSO_KEY: ", ".join(metadata.also_serves)} if metadata.also_serves else {}),
        KEY + "token_length": str(metadata.token_length),
        KEY + "pooled": metadata.pooled,
        KEY + "projection": _projection(layout),
        HEADER_HASH_KEY: NO_HASH,
    }
    if layout.output_width != family.text_width:
        ours[KEY + "text_width"] = str(layout.output_width)
    large, files = family.teacher_layout.size_name, " and ".join(f"{name}.safetensors" for name in family.companions)
    beside = f", beside {files}" if files else ""
    title = metadata.title or f"Distilled {layout.size_name} for {family.display_name}"
    spec = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec}/text-encoder",
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.description": f"{layout.size_name} in the place of {large}: {layout.parameters / 1e6:.0f} M parameters, {dtype}.",
        "modelspec.usage_hint": f"ComfyUI: Distilled Text Encoder Loader{beside}.",
        "modelspec.tags": f"text encoder, {layout.kind}, distilled, {family.name}",
        HASH_KEY: NO_HASH,
    }
    return {**metadata.facts, **spec, **ours, "format": "pt"}


# Computed for each new file, so not copied from the file that was loaded.
REWRITTEN = re.compile(
    r"format|modelspec\.(sai_model_spec|architecture|implementation|title|date|description|usage_hint|tags|hash_sha256)"
    r"|distilled_t5\.(format_version|family|also_serves|token_length|pooled|projection|text_width|header_sha256)"
)


def _choice(header: Mapping[str, str], key: str, allowed: tuple[str, ...], where: str) -> str:
    """A value of `allowed`, whose first one is the default."""
    value = header.get(key, allowed[0])
    if value not in allowed:
        raise _wrong(where, key, value, "one of " + ", ".join(dict.fromkeys(allowed)))
    return value


def _integer(header: Mapping[str, str], key: str, default: int, most: int, where: str) -> int:
    value = header.get(key, str(default))
    # isdecimal alone accepts digits of other scripts and numbers too long to parse.
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= most:
        raise _wrong(where, key, value, f"an integer from 1 to {most}")
    return int(value)


def _digest(header: Mapping[str, str], key: str, where: str) -> str | None:
    value = header.get(key)
    if value is None:
        return None
    if not re.fullmatch(r"(0x)?[0-9a-f]{64}", value.lower()):
        raise _wrong(where, key, value, "64 hexadecimal digits")
    return value.lower().removeprefix("0x")


def _wrong(where: str, key: str, value: str, expected: str) -> StudentFileError:
    return StudentFileError(
        f"{where}: its metadata says {printable(key)} = {_quoted(value)}, which is not valid: expected {expected}.",
        "download or export the file again; a file with wrong metadata is not loaded.",
    )


def _quoted(value: str) -> str:
    return repr(value if len(value) <= 80 else value[:77] + "...")
