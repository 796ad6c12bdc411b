"""Trim Text Encoder: a large encoder's file without the layers on which its family's text does not depend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..families import TRIMMABLE
from ..families.family import Family
from ..runtime.disk import publish, remove_abandoned, sync_folder, unfinished
from ..runtime.errors import StudentFileError, UserError
from ..runtime.header import MALFORMED, Entry, read_header
from ..runtime.progress import Progress, silent
from ..runtime.weights import check_readable
from ..students.kind import Layout, Shape
from .files import not_written
from .metadata import REWRITTEN, TRIMMED_KEY
from .needed_tensors import check_large_tensors, part_of
from .stream import copy_tensors

# Where some writers of quantised files describe the layers, in the metadata.
QUANTISED_KEY = "_quantization_metadata"


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
            copy_tensors(source, kept, aside, {**_kept_strings(strings, kept), **_description(family)}, progress)
            published = publish(aside, out, overwrite=False)
            sync_folder(published.parent)
    except OSError as error:
        raise not_written(out, error) from error
    return published


def read_trimmed(path: Path) -> tuple[dict[str, Entry], str] | None:
    """The tensors of a file of `trim`, and the family for which it was trimmed; None for another file."""
    try:
        entries, strings = read_header(path)
    except StudentFileError:
        return None
    return (entries, strings[TRIMMED_KEY]) if TRIMMED_KEY in strings else None


def check_trimmed(entries: Mapping[str, Entry], made_for: str, where: str, family: Family) -> None:
    """Raise StudentFileError unless a file that was trimmed for the family `made_for` has what the loader's family reads."""
    made, large = TRIMMABLE.get(made_for), family.teacher_layout
    serves = [name for name, one in TRIMMABLE.items() if made and one.teacher == made.teacher and one.layers_read <= made.layers_read]
    if made and family.name not in serves:
        raise StudentFileError(
            f"{where} was trimmed for {made.display_name}; the type is {family.name}.", f"set type to {' or '.join(serves)}."
        )
    again = f"trim the complete {large.size_name} for {family.display_name} again, or pick another file."
    check_large_tensors(_shapes(entries), where, family, again, "type")


def _shapes(entries: Mapping[str, Entry]) -> dict[str, Shape]:
    return {name: entry.shape for name, entry in entries.items()}


def _kept(entries: Mapping[str, Entry], where: str, family: Family) -> dict[str, Entry]:
    large = family.teacher_layout
    if not family.layers_read:
        raise UserError(
            f"{family.display_name} reads all layers of {large.size_name}: none can be left out.",
            f"set type to one of {', '.join(TRIMMABLE)}.",
        )
    pick = f"pick the {large.size_name} file that ComfyUI's own loader takes for {family.display_name}."
    check_large_tensors(_shapes(entries), where, family, pick, "type")
    names, _ = family.kind.published_names(entries)
    unread = _layers(large) - _layers(family.read_layout)
    kept = {source: entries[source] for name, source in names.items() if part_of(name) not in unread}
    if len(kept) == len(entries):
        raise UserError(f"{where} has no layer beyond the {family.layers_read} that {family.display_name} reads.", "use it as it is.")
    return kept


def _layers(layout: Layout) -> set[str]:
    return {part_of(name) for name in layout.tensors()}


def _kept_strings(strings: Mapping[str, str], kept: Mapping[str, Entry]) -> dict[str, str]:
    """What the source's metadata says of the new file too; of quantised layers, only of those that are kept."""
    strings = {key: value for key, value in strings.items() if not REWRITTEN.fullmatch(key)}
    if QUANTISED_KEY not in strings:
        return strings
    layers = {part_of(name) for name in kept}
    try:
        said = json.loads(strings[QUANTISED_KEY])
        described = {name: how for name, how in said.get("layers", {}).items() if name in layers}
    except MALFORMED as error:
        raise StudentFileError(f"The file's metadata {QUANTISED_KEY} has no table of layers.", "download the file again.") from error
    return {**strings, QUANTISED_KEY: json.dumps({**said, "layers": described})}


def _description(family: Family) -> dict[str, str]:
    large = family.teacher_layout
    return {
        TRIMMED_KEY: family.name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.modelspec}/text-encoder",
        "modelspec.title": f"{large.size_name} for {family.display_name}: {family.layers_read} of {large.num_layers} layers",
        "format": "pt",
    }
