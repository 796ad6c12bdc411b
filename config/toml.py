"""TOML text, read and written."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from ..runtime.optional import needed


def toml_parser() -> Any:
    """The standard library's parser, or tomli on Python 3.10. Raises ValueError with the pip command if tomli is missing."""
    return importlib.import_module("tomllib") if sys.version_info >= (3, 11) else needed("tomli", "tomli", "Reading TOML on Python 3.10")


def toml_value(value: Any) -> str:
    """A value on one line of TOML."""
    if isinstance(value, str):
        # TOML knows all escapes of JSON; JSON does not escape this control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return str(value)  # numbers and dates are written the same in Python and TOML


def write_toml(data: Mapping[str, Any]) -> str:
    """TOML of plain keys, then tables, then arrays of tables; deeper levels are written inline. Reads back as `data`."""
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    arrays = {key: value for key, value in data.items() if key not in tables and _is_array_of_tables(value)}
    blocks = [_lines(data, leave_out=[*tables, *arrays])]
    blocks += [f"[{key}]\n{_lines(table)}" for key, table in tables.items()]
    blocks += [f"[[{key}]]\n{_lines(table)}" for key, array in arrays.items() for table in array]
    return "\n".join(blocks)


def _lines(table: Mapping[str, Any], leave_out: Collection[str] = ()) -> str:
    return "".join(f"{key} = {_item_per_line(value)}\n" for key, value in table.items() if key not in leave_out)


def _item_per_line(value: Any) -> str:
    if not _is_array_of_tables(value):
        return toml_value(value)
    return "[\n" + "".join(f"    {toml_value(item)},\n" for item in value) + "]"


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
