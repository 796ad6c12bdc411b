"""TOML text: read, written, and on which line each of its keys stands (the parser does not tell)."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

# Keys and positions from the root of a recipe: ("stage", 0, "steps").
KeyPath = tuple[str | int, ...]

TOKEN = re.compile(
    r"""(?P<blank>[ \t\r]+ | \#[^\n]*)
      | (?P<newline>\n)
      | (?P<text>\"{3}(?:\\[\s\S]|[^\\])*?\"{3,5} | '{3}[\s\S]*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*')
      | (?P<sign>[\[\]{}=,.])
      | (?P<bare>[^\s\[\]{}=,.\#"']+)""",
    re.VERBOSE,
)


def read_toml(text: str) -> dict[str, Any]:
    """Parse TOML 1.0. Raises ValueError that names line and column, ModuleNotFoundError where Python brings no parser."""
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Python 3.10 cannot read TOML by itself.\nWhat to do: python -m pip install tomli") from error
    try:
        return toml.loads(text)
    except RecursionError as error:
        raise ValueError("arrays or tables inside each other, deeper than can be read") from error


def dotted(path: KeyPath) -> str:
    """A path as `--set` takes it."""
    return ".".join(map(str, path))


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, counted from 1, of every key, table and array item of a valid TOML document."""
    return _LineScanner(text).scan()


class _LineScanner:
    """Walks through a document that the TOML parser has accepted, so it need not tell what is wrong with one."""

    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str, int]] = []
        self.place = 0
        self.lines: dict[KeyPath, int] = {}
        self.lengths: dict[KeyPath, int] = {}
        line = 1
        for match in TOKEN.finditer(text):
            if match.lastgroup != "blank":
                self.tokens.append((match.lastgroup or "", match.group(), line))
            line += match.group().count("\n")
        self.tokens.append(("newline", "\n", line))

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.place < len(self.tokens):
            kind, sign, _ = self.tokens[self.place]
            if kind == "newline":
                self.place += 1
            elif (kind, sign) == ("sign", "["):
                table = self._header()
            else:
                self._pair(table)
        return self.lines

    def _at(self, *signs: str) -> bool:
        kind, sign, _ = self.tokens[self.place]
        return kind in ("sign", "newline") and sign in signs

    def _header(self) -> KeyPath:
        """`[a.b]` or `[[a.b]]`; each part that is an array of tables means its last one."""
        line = self.tokens[self.place][2]
        self.place += 1
        new_item = self._at("[")
        self.place += new_item
        path: KeyPath = ()
        names = self._key()
        for number, name in enumerate(names, start=1):
            path += (name,)
            if new_item and number == len(names):
                self.lengths[path] = self.lengths.get(path, 0) + 1
            if path in self.lengths:
                path += (self.lengths[path] - 1,)
        self.place += 1 + new_item
        self._note(path, line)
        return path

    def _key(self) -> list[str]:
        names = [self._name()]
        while self._at("."):
            self.place += 1
            names.append(self._name())
        return names

    def _name(self) -> str:
        kind, name, _ = self.tokens[self.place]
        self.place += 1
        return read_toml(f"name = {name}")["name"] if kind == "text" else name

    def _pair(self, table: KeyPath) -> None:
        line = self.tokens[self.place][2]
        path = (*table, *self._key())
        self._note(path, line)
        self.place += 1
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        if self._at("[", "{"):
            closing = {"[": "]", "{": "}"}[self.tokens[self.place][1]]
            self.place += 1
            self._items(path, closing)
            return
        while not self._at("\n", ",", "]", "}"):
            self.place += 1

    def _items(self, path: KeyPath, closing: str) -> None:
        index = 0
        while not self._at(closing):
            if self._at("\n", ","):
                index += self._at(",")
                self.place += 1
            elif closing == "}":
                self._pair(path)
            else:
                self._note((*path, index), self.tokens[self.place][2])
                self._value((*path, index))
        self.place += 1

    def _note(self, path: KeyPath, line: int) -> None:
        for length in range(1, len(path)):
            self.lines.setdefault(path[:length], line)
        self.lines[path] = line


def toml_value(value: Any) -> str:
    """A value on one line of TOML."""
    if isinstance(value, str):
        # JSON's escapes are all TOML's; JSON leaves this one control character as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return str(value)  # numbers and dates look alike in Python and TOML


def write_toml(data: Mapping[str, Any]) -> str:
    """TOML of plain keys, then tables, then arrays of tables; what lies deeper is written inline. Reads back as `data`."""
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
