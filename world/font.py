"""A pixel font of capital letters, 3 cells wide and 5 high; any two letters differ in at least two cells."""

from __future__ import annotations

import numpy as np

GLYPH_WIDTH, GLYPH_HEIGHT = 3, 5

_DRAWN = {
    "a": ".#. #.# ### #.# #.#",
    "b": "##. #.# ##. #.# ##.",
    "c": ".## #.. #.. #.. .##",
    "d": "##. #.# #.# #.# ##.",
    "e": "### #.. ##. #.. ###",
    "f": "### #.. ##. #.. #..",
    "g": ".## #.. #.# #.# .##",
    "h": "#.# #.# ### #.# #.#",
    "i": "### .#. .#. .#. ###",
    "j": "..# ..# ..# #.# .#.",
    "k": "#.# ##. #.. ##. #.#",
    "l": "#.. #.. #.. #.. ###",
    "m": "#.# ### #.# #.# #.#",
    "n": "##. #.# #.# #.# #.#",
    "o": ".#. #.# #.# #.# .#.",
    "p": "### #.# ### #.. #..",
    "q": "### #.# #.# ### ..#",
    "r": "### #.# ##. #.# #.#",
    "s": ".## #.. .#. ..# ##.",
    "t": "### .#. .#. .#. .#.",
    "u": "#.# #.# #.# #.# ###",
    "v": "#.# #.# #.# #.# .#.",
    "w": "#.# #.# #.# ### #.#",
    "x": "#.# #.# .#. #.# #.#",
    "y": "#.# #.# .#. .#. .#.",
    "z": "### ..# .#. #.. ###",
}


def bitmap(rows: str) -> np.ndarray:
    """Rows of `#` and `.` with spaces between them as a boolean array [height, width]."""
    return np.array([[cell == "#" for cell in row] for row in rows.split()])


GLYPHS: dict[str, np.ndarray] = {letter: bitmap(rows) for letter, rows in _DRAWN.items()}
