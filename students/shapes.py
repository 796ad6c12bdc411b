"""Tensor shapes of a file compared with those of a layout, for every kind of student."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import TypeVar

from ..runtime.errors import StudentFileError, listed, printable
from .kind import Layout, Shape

AnyLayout = TypeVar("AnyLayout", bound=Layout)


def checked(layout: AnyLayout, shapes: Mapping[str, Shape], where: str, kind: str) -> AnyLayout:
    """The layout, if a file has exactly its tensors. Raises StudentFileError that lists those that are missing, unexpected or misshapen.

    Blocks are counted, not parsed: a forged block number must not make the table of expected names huge.
    """
    wanted = layout.tensors()
    missing = [name for name in wanted if name not in shapes]
    extra = [name for name in shapes if name not in wanted]
    wrong = [
        f"{name}: expected {list(shape)}, got {list(shapes[name])}" for name, shape in wanted.items() if shapes.get(name, shape) != shape
    ]
    if missing or extra or wrong:
        parts = [("Missing:", missing), (f"Not part of a distilled {kind}:", extra), ("Wrong shape:", wrong)]
        raise StudentFileError(
            f"{where} is not a complete distilled {kind}: {len(missing)} tensors missing, {len(extra)} unexpected, {len(wrong)} misshapen.",
            f"download or export the file again; it was read as {layout.size_name}, by its embedding, its first block and its projection.",
            "\n".join(f"{title}\n{listed(names)}" for title, names in parts if names),
        )
    return layout


def matrices(shapes: Mapping[str, Shape], names: list[str], where: str, kind: str) -> list[Shape]:
    """The shapes of tensors that must exist and be matrices. Raises StudentFileError."""
    missing = [name for name in names if name not in shapes]
    if missing:
        raise StudentFileError(
            f"{where} is not a complete distilled {kind}: {len(missing)} of the tensors that determine its sizes are missing.",
            f"download or export the file again, or pick the distilled {kind} file.",
            f"Missing:\n{listed(missing)}\n{_beginning(shapes)}",
        )
    for name in names:
        if len(shapes[name]) != 2 or min(shapes[name]) < 1:
            raise StudentFileError(
                f"{where}: {name}: expected a matrix, got shape {printable(str(list(shapes[name])))}.",
                "download or export the file again.",
            )
    return [shapes[name] for name in names]


def heads_of(width: int, heads: int, where: str, what: str = "attention heads") -> int:
    """`width` divided among heads (or into heads of this width). Raises StudentFileError if it cannot be."""
    if width % heads:
        raise StudentFileError(
            f"{where}: the attention width {width} is not a multiple of its {heads} {what}.", "download or export the file again."
        )
    return width // heads


def count_blocks(names: Collection[str], beginning: str) -> int:
    """The number of consecutive blocks from 0, by the beginning of their names; blocks beyond a gap are reported as unexpected."""
    present = {name.removeprefix(beginning).partition(".")[0] for name in names if name.startswith(beginning)}
    return next(count for count in itertools.count() if str(count) not in present)


def _beginning(shapes: Mapping[str, Shape]) -> str:
    return f"It holds {len(shapes)} tensors, the first being:\n{listed(sorted(shapes)[:8])}" if shapes else "It holds no tensors."
