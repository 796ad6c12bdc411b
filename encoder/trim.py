"""Trim Text Encoder: a large encoder's file without the layers on which its family's text does not depend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..families import FAMILIES
from ..families.family import Family
from ..runtime.disk import publish, remove_abandoned, sync_folder, unfinished
from ..runtime.errors import StudentFileError, UserError, listed
from ..runtime.header import Entry, read_header
from ..runtime.progress import Progress, silent
from ..runtime.weights import check_readable
from ..students import kind_of
from ..students.foreign import QUANTISED, foreign_kind
from ..students.kind import Layout
from .files import not_written
from .metadata import TRIMMED_KEY
from .stream import copy_tensors

# Where some writers of quantised files describe the layers, in the metadata.
QUANTISED_KEY = "_quantization_metadata"
TRIMMABLE = {name: family for name, family in FAMILIES.items() if family.layers_read}


def trim(source: Path, family: Family, out: Path, progress: Progress = silent) -> Path:
    """Write the part of a large encoder that the family reads, in the file's number formats, byte by byte; returns the new file's path.

    An existing file is never overwritten: the new one gets a number. `progress` counts bytes. Raises StudentFileError for a file that is
    not the family's large encoder, UserError where no layer can be left out, and OSError when the disk does not take the file.
    """
    check_readable(source)
    entries, strings = read_header(source)
    kept = _kept(entries, source.name, family)
    remove_abandoned(out.parent)
    try:
        with unfinished(out) as aside:
            copy_tensors(source, kept, aside, {**_quantisation(strings, kept), **_description(family)}, progress)
            published = publish(aside, out, overwrite=False)
            sync_folder(published.parent)
    except OSError as error:
        raise not_written(out, error) from error
    return published


def trimmed_tensors(path: Path) -> dict[str, Entry] | None:
    """The tensors of a file of `trim` by published name; None for another file."""
    try:
        entries, strings = read_header(path)
    except StudentFileError:
        return None
    if TRIMMED_KEY not in strings:
        return None
    names, _ = kind_of(list(entries)).published_names(entries)
    return {name: entries[source] for name, source in names.items()}


def _kept(entries: Mapping[str, Entry], where: str, family: Family) -> dict[str, Entry]:
    large, size_name = family.teacher_layout, family.teacher_layout.size_name
    if not family.layers_read:
        raise UserError(
            f"{family.display_name} reads all layers of {size_name}: none can be left out.", f"set type to one of {', '.join(TRIMMABLE)}."
        )
    names, _ = family.kind.published_names(entries)
    by_name = {name: entries[source] for name, source in names.items()}
    check_large_file(by_name, where, family)
    unread = _layers(large) - _layers(family.read_layout)
    kept = {names[name]: entry for name, entry in by_name.items() if _layer_of(name) not in unread}
    if len(kept) == len(entries):
        raise UserError(f"{where} has no layer beyond the {family.layers_read} that {family.display_name} reads.", "use it as it is.")
    return kept


def _layers(layout: Layout) -> set[str]:
    return {_layer_of(name) for name in layout.tensors()}


def _layer_of(name: str) -> str:
    """A tensor's name without its last part, which its scales have in common with it."""
    return name.rpartition(".")[0]


def check_large_file(by_name: Mapping[str, Entry], where: str, family: Family) -> None:
    """Raise StudentFileError unless a file has what the family reads of its large encoder, in any number format.

    `by_name`: its tensors by published name.
    """
    kind, size_name = family.kind, family.teacher_layout.size_name
    pick = f"pick the {size_name} file that ComfyUI's own loader takes for {family.display_name}."
    foreign = foreign_kind(by_name, kind)
    if foreign is not None or any(name.startswith(kind.projection) for name in by_name):
        what = f"a distilled {kind.display_name}, which is read to its end" if foreign is None else foreign.name
        raise StudentFileError(f"{where} is {what}; expected a {size_name}.", pick)
    if any("visual." in name for name in by_name):
        raise StudentFileError(
            f"{where} has vision layers; expected a {size_name}, which reads text alone.",
            f"for image input keep the complete encoder; for text, {pick}",
        )
    other = kind_of(list(by_name))
    if other is not kind and any(name.endswith(other.signs) for name in by_name):
        raise StudentFileError(f"{where} is a {other.display_name}; expected a {size_name}.", f"check the type, or {pick}")
    _check_width(by_name, where, family, pick)
    wanted = family.read_layout.tensors()
    quantised = {_layer_of(name) for name in by_name if name.endswith(tuple(QUANTISED))}
    shapes = {name: wanted[name] if _layer_of(name) in quantised else entry.shape for name, entry in by_name.items() if name in wanted}
    wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
    if wrong:
        raise StudentFileError(
            f"{where} is not a complete {size_name}: of the {len(wanted)} tensors that {family.display_name} reads, {len(wrong)} are "
            "missing or misshapen.",
            f"download it again, or {pick}",
            listed(wrong, 10),
        )


def _check_width(by_name: Mapping[str, Entry], where: str, family: Family, pick: str) -> None:
    """Raise StudentFileError for the large encoder of another family, by the width of its token table."""
    kind, expected = family.kind, family.teacher_layout.output_width
    found = kind.width_in({name: entry.shape for name, entry in by_name.items()})
    if found in (None, expected):
        return
    fitting = [name for name, other in TRIMMABLE.items() if (other.kind, other.teacher_layout.output_width) == (kind, found)]
    raise StudentFileError(
        f"{where} has a token table of width {found}; expected {expected}, that of the {family.teacher_layout.size_name} of "
        f"{family.display_name}.",
        f"set type to {' or '.join(fitting)}, or {pick}" if fitting else pick,
    )


def _quantisation(strings: Mapping[str, str], kept: Mapping[str, Entry]) -> dict[str, str]:
    """The file's metadata; what it says of quantised layers, without those that are left out."""
    if QUANTISED_KEY not in strings:
        return dict(strings)
    said = json.loads(strings[QUANTISED_KEY])
    layers = {_layer_of(name) for name in kept}
    said["layers"] = {name: how for name, how in said.get("layers", {}).items() if name in layers}
    return {**strings, QUANTISED_KEY: json.dumps(said)}


def _description(family: Family) -> dict[str, str]:
    large = family.teacher_layout
    return {
        TRIMMED_KEY: family.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec}/text-encoder",
        "modelspec.title": f"{large.size_name} for {family.display_name}: {family.layers_read} of {large.num_layers} layers",
        "format": "pt",
    }
