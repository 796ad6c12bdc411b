"""Kinds of student networks: one package each, and one entry here."""

from __future__ import annotations

from .kind import StudentKind
from .qwen3 import QWEN3
from .t5 import T5

# The first kind with a sign in a file counts: a kind whose files have another's sign stands before it (umT5's have T5's).
KINDS: dict[str, StudentKind] = {kind.name: kind for kind in (T5, QWEN3)}


def kind_of(names: list[str]) -> StudentKind:
    """The kind that tensor names (published or not) belong to; T5 for names of none, to say what is missing."""
    signed = (kind for kind in KINDS.values() if any(name.endswith(kind.signs) for name in names))
    return next(signed, T5)
