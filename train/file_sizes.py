"""What the headers of a run's model files tell, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..families.family import Family
from ..runtime.header import Entry
from ..students import kind_of


def text_width_in(files: Iterable[Mapping[str, Entry]], family: Family) -> int:
    """Channels of the text that a teacher gives, judged by the headers of its files; the family's if they do not tell."""
    return next((width for each in files if (width := _width_in(each, family.stacked)) is not None), family.text_width)


def _width_in(entries: Mapping[str, Entry], stacked: int) -> int | None:
    kind = kind_of(list(entries))
    names, _ = kind.published_names(entries)
    width = kind.width_in({name: entries[source].shape for name, source in names.items()})
    projected = any(name.startswith(kind.projection) for name in names)
    return width if width is None or projected else width * stacked
