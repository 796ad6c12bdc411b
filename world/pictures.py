"""What a scene can contain, and its image with one colour per cell. A cell is one latent cell of 8 x 8 pixels."""

# H W cells, 3 red green blue from 0 to 1

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .font import GLYPH_HEIGHT, GLYPH_WIDTH, GLYPHS, bitmap

SIDE, CELL_PX, SHAPE_SIDE = 12, 8, 5
RED, GREEN, BLUE = range(3)

TASKS = ("single_object", "colour_shape_binding", "position", "count", "word", "two_words")

# Each channel is 0, 1/2 or 1: values that the VAE restores exactly (autoencoder.py), far enough apart to be distinguished.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 0.5, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "orange": (1.0, 0.5, 0.0),
    "purple": (0.5, 0.0, 1.0),
    "pink": (1.0, 0.5, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "snow": (1.0, 1.0, 1.0),
    "night": (0.0, 0.0, 0.0),
    "fog": (0.5, 0.5, 0.5),
    "beach": (1.0, 1.0, 0.5),
    "sea": (0.0, 0.0, 0.5),
    "meadow": (0.5, 1.0, 0.5),
}
# The background of a caption that names none.
USUAL_BACKGROUND = "snow"
PALETTE = COLOURS | BACKGROUNDS

SHAPES: dict[str, np.ndarray] = {
    "square": bitmap("##### ##### ##### ##### #####"),
    "ring": bitmap(".###. #...# #...# #...# .###."),
    "cross": bitmap("..#.. ..#.. ##### ..#.. ..#.."),
    "heart": bitmap(".#.#. ##### ##### .###. ..#.."),
    "tree": bitmap(".###. ##### .###. ..#.. ..#.."),
}

# Left and top cell. All are even, since 2 x 2 cells are one token of Flux.
PLACES: dict[str, tuple[int, int]] = {
    "centre": (4, 4),
    "left": (0, 4),
    "right": (6, 4),
    "top": (4, 0),
    "bottom": (4, 6),
    "top left": (0, 0),
    "top right": (6, 0),
    "bottom left": (0, 6),
    "bottom right": (6, 6),
}
# All arrangements of things; within one, no two overlap or touch.
ROW, COLUMN = ("left", "right"), ("top", "bottom")
THREES = (
    ("top left", "top right", "bottom"),
    ("top", "bottom left", "bottom right"),
    ("top left", "bottom left", "right"),
    ("left", "top right", "bottom right"),
)
FOUR = ("top left", "top right", "bottom left", "bottom right")
ARRANGEMENTS: tuple[tuple[str, ...], ...] = (*((place,) for place in PLACES), ROW, COLUMN, *THREES, FOUR)
# The arrangement of a number of things if the caption names none.
USUAL_ARRANGEMENT = {1: ("centre",), 2: ROW, 3: THREES[0], 4: FOUR}

LETTERS_IN_A_WORD = 3
LETTER_PITCH = GLYPH_WIDTH + 1
# Top cell of each line, by the number of lines.
LINES: dict[int, tuple[int, ...]] = {1: (4,), 2: (0, 6)}


@dataclass(frozen=True)
class Thing:
    """A shape of one colour at a place (keys of SHAPES, COLOURS, PLACES)."""

    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """What an image shows: things, or the words of a sign and the colour of its letters. `task` says how it is judged."""

    task: str
    background: str = USUAL_BACKGROUND
    things: tuple[Thing, ...] = ()
    words: tuple[str, ...] = ()
    ink: str = ""


def names_HW(scene: Scene) -> np.ndarray:
    """The name of each cell's colour (a key of PALETTE), [H, W]."""
    cells_HW = np.full((SIDE, SIDE), scene.background, dtype="<U8")
    for thing in scene.things:
        left, top = PLACES[thing.place]
        cells_HW[top : top + SHAPE_SIDE, left : left + SHAPE_SIDE][SHAPES[thing.shape]] = thing.colour
    for top, word in zip(LINES[len(scene.words)] if scene.words else (), scene.words, strict=True):
        for column, letter in enumerate(word):
            left = column * LETTER_PITCH
            cells_HW[top : top + GLYPH_HEIGHT, left : left + GLYPH_WIDTH][GLYPHS[letter]] = scene.ink
    return cells_HW


def render(scene: Scene, cell_px: int = 1) -> np.ndarray:
    """The image [H, W, 3], float32 from 0 to 1; a cell has `cell_px` x `cell_px` pixels."""
    names, inverse = np.unique(names_HW(scene), return_inverse=True)
    colours = np.array([PALETTE[name] for name in names], dtype=np.float32)
    image = colours[inverse.reshape(SIDE, SIDE)]
    return image.repeat(cell_px, axis=0).repeat(cell_px, axis=1)


def relations(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """Triples (one, relation, other) for each pair of things whose columns (left of) or rows (above) do not meet; no inverses."""
    pairs = [(one, other) for one in scene.things for other in scene.things if one is not other]
    found = [(one, "left of", other) for one, other in pairs if _apart(one, other, axis=0)]
    return found + [(one, "above", other) for one, other in pairs if _apart(one, other, axis=1)]


def _apart(one: Thing, other: Thing, axis: int) -> bool:
    return PLACES[one.place][axis] + SHAPE_SIDE < PLACES[other.place][axis] + 1
