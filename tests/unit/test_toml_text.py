"""TOML text: on which line each key stands, held against the parser, and what is written reads back."""

from __future__ import annotations

import math
import random
import tomllib
from typing import Any

import pytest
from distilled_t5.config.toml import key_lines, write_toml


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """Every value that is neither table nor array, with its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in leaves(item, (*path, key))]
    return [(path, value)]


# Every @ becomes the number of its own line, so each document tells by itself where its keys are.
DOCUMENTS = {
    "plain keys, comments, blank lines": "\n# a = 1\na = @\n\n  b=@ # [c]\n# end",
    "tables": "a = @\n[t]\na = @\n# [x]\n[ u . v ] # w\na = @\n\nb = @\n[u]\na = @\n",
    "arrays of tables": "[[s]]\na = @\n[[s]]\na = @\n[[ s ]]\n\nb = @",
    "arrays of tables within": "[[s]]\na = @\n[[s.c]]\nk = @\n[[s.c]]\nk = @\n[s.d]\nk = @\n[[s]]\n[[s.c]]\nk = @\n[s.c.e]\nx = @\n",
    "dotted keys": "a.b.c = @\na.b.d = @\na.e = @\n[t]\nu.v=@\nu . w = @\n",
    "quoted keys": "\"a b\" = @\n'c.d'.\"e\\\"f\" = @\n[\"[x]\".'#']\n'\\' = @\n\"\\u00e4\" = @\n",
    "inline tables": "a = { b = @, c.d = @, e = { f = @ }, g = {} }\nh = @\ni = {j=@,k='}'}\nl = @\n",
    "arrays": "a = [@, @]\nb = [\n  @, # [\n\n  @,\n]\nc = [[@], [\n@,[@]], []]\nd = @\n",
    "arrays of inline tables": "a = [\n  { k = @ },\n  { k = @, m = [\n    @,\n    { x = @ } ] }, # }\n]\nb = @\n",
    "strings of one line": "a = \"# ] } ' \\\" = [x]\"\nb = @\nc = ' \" # \\'\nd = @\ne = [\"]\", ']', \"}\"]\nf = @\n",
    "strings of many lines": 'a = """\n[x]\nb = 9 # " ""\n\\""" c = 9\n"""\nd = @\ne = \'\'\'\n"""\n\'\'\'\nf = @\n',
    "quotes inside and at the end of strings":
        'a = """"quoted""""\nb = @\nc = """""x"""""\nd = @\ne = \'\'\'\'q\'\'\'\'\'\nf = @\ng = ""\nh = @\ni = """"""\nj = @\n',
    "numbers and dates": "a = -1.5e+10\nb = @\nc = 1979-05-27 07:32:00.5Z\nd = @\ne = +inf\nf = @\ng = [1.5, 07:32:00]\nh = @\n1.2 = @\n",
    "bare keys like values": "true = @\n1979-05-27 = @\n[inf]\n3.14 = @\n",
}  # fmt: skip


def numbered(document: str) -> str:
    return "\n".join(line.replace("@", str(number)) for number, line in enumerate(document.split("\n"), start=1))


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_key_is_found_on_its_line(document):
    text = numbered(document)
    lines = key_lines(text)
    found = leaves(tomllib.loads(text))
    assert {path for path, _ in found} <= set(lines)
    told = {path: value for path, value in found if type(value) is int}
    assert len(told) == document.count("@") > 0
    assert told == {path: lines[path] for path in told}


def test_lines_of_tables_and_their_positions():
    text = "[student]\n\n[student.layout]\nd = 1\n[[stage]]\n[[stage]]\nx.y = 1\n[late.table]\n[late]\n"
    assert key_lines(text) == {
        ("student",): 1,
        ("student", "layout"): 3,
        ("student", "layout", "d"): 4,
        ("stage",): 5,
        ("stage", 0): 5,
        ("stage", 1): 6,
        ("stage", 1, "x"): 7,
        ("stage", 1, "x", "y"): 7,
        ("late",): 9,
        ("late", "table"): 8,
    }


def random_value(draw: random.Random, depth: int = 0) -> str:
    gap = draw.choice(["", " ", "\n", " # , ] } = [\n\n"])
    kind = draw.random() * (1 if depth < 3 else 0.5)
    if kind < 0.3:
        return "@"
    if kind < 0.5:
        return draw.choice(['"""\n#[a]\n"""', "'''\n\n'''", '"]#"', "'}'", "1.5", "2024-01-01 10:00:00", '""', '"""\\\n  """'])
    items = [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind < 0.8:
        return "[" + gap + ("," + gap).join(items) + (gap if gap.strip(" ") else "") + "]"
    return "{" + ", ".join(f"k{number} = {item}" for number, item in enumerate(items)) + "}"


def test_random_documents_agree_with_the_parser():
    draw = random.Random(0)
    told = 0
    for _ in range(300):
        lines = [f"k{number}{draw.choice(['', '.x.y'])} = {random_value(draw)}" for number in range(draw.randrange(4))]
        for table in range(draw.randrange(4)):
            lines += [
                f"[t{table}]",
                f"a = {random_value(draw)}",
                *(["[[s]]", f"b = {random_value(draw)}", "[[s.u]]", "c = @"] * draw.randrange(3)),
            ]
        text = numbered("\n".join(lines))
        found = {path: value for path, value in leaves(tomllib.loads(text)) if type(value) is int}
        where = key_lines(text)
        assert found == {path: where[path] for path in found}, text
        told += len(found)
    assert told > 1000


def test_any_text_and_number_survives_writing():
    draw = random.Random(0)
    letters = [*map(chr, range(0x20)), "\x7f", "\x85", '"', "\\", "'", "a", "#", "\u00e4", "\u2028", "\ufeff", "\U0001f600"]
    for _ in range(500):
        text = "".join(draw.choices(letters, k=draw.randrange(12)))
        number = draw.choice([draw.random(), 10 ** draw.uniform(-300, 300), float(draw.randrange(-5, 5))])
        table = {
            "t": text,
            "n": number,
            "i": draw.randrange(-(2**63), 2**63),
            "b": draw.random() < 0.5,
            "l": [text, {"x": [number]}],
            "e": {},
        }
        read = tomllib.loads(write_toml({"a": table, "b": [table, table], "c": text}))
        assert read == {"a": table, "b": [table, table], "c": text}
        assert math.copysign(1, read["a"]["n"]) == math.copysign(1, number)
        assert type(read["a"]["n"]) is float
