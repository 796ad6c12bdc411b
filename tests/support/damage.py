"""Damaged safetensors files, as strategies of hypothesis."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from .tiny_students import joined, taken_apart

# The same files each time; FUZZ_EXAMPLES in the environment asks for more.
FUZZING = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
WORDS = (
    "F16",
    "F32",
    "BF16",
    "F64",
    "F8_E4M3",
    "F4",
    "I8",
    "BOOL",
    "C64",
    "none",
    "0",
    "257",
    "1e9",
    "9" * 5000,
    "0x" + "f" * 64,
    "\ud800",
)
NUMBERS = (-1, 0, 1, 2**31, 2**62, 2**64, 10**400, 1e300)
JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(WORDS) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.text(max_size=8) | st.sampled_from(("module.", "encoder.encoder.block.7.", "x" * 5000, "distilled_t5.family", "__metadata__"))


@st.composite
def damaged(draw: st.DrawFn, file: bytes) -> bytes:
    """Bytes that differ from the file's."""
    return draw(st.one_of(edited(file), relabelled(file)).filter(lambda made: made != file))


@st.composite
def edited(draw: st.DrawFn, file: bytes) -> bytes:
    """Bytes replaced, removed or inserted at a few places, half of them in the header."""
    header_end = 8 + int.from_bytes(file[:8], "little")
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, header_end) | st.integers(0, len(file)))
        stop = start + draw(st.integers(0, 16) | st.just(len(file)))
        file = file[:start] + draw(st.binary(max_size=16)) + file[stop:]
    return file


@st.composite
def relabelled(draw: st.DrawFn, file: bytes) -> bytes:
    """Entries of the header, or fields of them, replaced by other JSON, exchanged, renamed or removed."""
    header, data = taken_apart(file)
    for _ in range(draw(st.integers(1, 3))):
        tables: list[dict[str, Any]] = [header, *(entry for entry in header.values() if isinstance(entry, dict))]
        table: dict[str, Any] = draw(st.sampled_from([table for table in tables if table] or [{"": 0}]))
        key, other = draw(st.sampled_from(list(table))), draw(st.sampled_from(list(table)))
        change = draw(st.sampled_from(("replace", "exchange", "rename", "remove")))
        if change == "replace":
            table[key] = draw(JSON)
        elif change == "exchange":
            table[key], table[other] = table[other], table[key]
        elif change == "rename":
            table[draw(NAMES) + draw(st.sampled_from(("", key)))] = table.pop(key)
        else:
            del table[key]
    return joined(header, data)
