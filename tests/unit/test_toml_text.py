"""TOML text: whatever is written reads back."""

from __future__ import annotations

import math
import random
import tomllib

from distilled_t5.config.toml import write_toml


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
