"""The reader finds the scene in an image. It tolerates two wrong cells and colours that are slightly off."""

# H W cells, 3 red green blue, C colours, S shapes

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .font import GLYPH_HEIGHT, GLYPH_WIDTH, GLYPHS
from .pictures import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURS,
    LETTER_PITCH,
    LETTERS_IN_A_WORD,
    LINES,
    PALETTE,
    PLACES,
    SHAPE_SIDE,
    SHAPES,
    SIDE,
    Scene,
    Thing,
    names_HW,
)

# Any two shapes differ in at least five cells, so that two wrong cells are unambiguous.
MOST_WRONG_CELLS = 2
_SHAPE_BITS = np.array([shape.ravel() for shape in SHAPES.values()])
_GLYPH_BITS = np.array([glyph.ravel() for glyph in GLYPHS.values()])


@dataclass(frozen=True)
class Reading:
    """What an image shows, and the number of cells that differ from a perfect image of it."""

    background: str
    things: tuple[Thing, ...]
    words: tuple[str, ...]
    ink: str
    wrong_cells: int


def cells(image: np.ndarray) -> np.ndarray:
    """An image [k*H, k*W, 3] averaged to one colour per cell, [H, W, 3] float64. Raises ValueError for another shape."""
    height, width, *channels = image.shape
    if channels != [3] or height != width or height % SIDE:
        raise ValueError(
            f"Not an image of this world: expected the shape [{SIDE}k, {SIDE}k, 3], got {list(image.shape)}.\n"
            f"What to do: give it as height, width, colour, {SIDE * 8} pixels wide and high."
        )
    scale = height // SIDE
    return np.asarray(image, dtype=np.float64).reshape(SIDE, scale, SIDE, scale, 3).mean(axis=(1, 3))


def nearest_names(colours_HW3: np.ndarray) -> np.ndarray:
    """The name of the nearest colour of the palette for each cell, [H, W]."""
    palette_C3 = np.array(list(PALETTE.values()))
    distances_HWC = np.square(colours_HW3[:, :, None] - palette_C3).sum(axis=-1)
    return np.array(list(PALETTE))[distances_HWC.argmin(axis=-1)]


def read(image: np.ndarray) -> Reading | None:
    """What the image [k*H, k*W, 3] (0 to 1) shows; None if no scene explains all but MOST_WRONG_CELLS of its cells.

    Every arrangement of things and every number of lines is tried. The one with the fewest wrong cells wins; a tie gives None.
    """
    grid_HW = nearest_names(cells(image))
    background = max(BACKGROUNDS, key=lambda name: int((grid_HW == name).sum()))
    readings = sorted({_rated(scene, grid_HW) for scene in _explanations(grid_HW, background)}, key=lambda reading: reading.wrong_cells)
    best, second, *_ = readings
    return best if best.wrong_cells <= MOST_WRONG_CELLS and best.wrong_cells < second.wrong_cells else None


def _rated(scene: Scene, grid_HW: np.ndarray) -> Reading:
    wrong = int((names_HW(scene) != grid_HW).sum())
    return Reading(scene.background, scene.things, scene.words, scene.ink, wrong)


def _explanations(grid_HW: np.ndarray, background: str) -> Iterator[Scene]:
    things = {place: _thing_at(grid_HW, place, background) for place in PLACES}
    yield Scene("", background)
    for arrangement in ARRANGEMENTS:
        yield Scene("", background, things=tuple(things[place] for place in arrangement))
    ink = max(COLOURS, key=lambda name: int((grid_HW == name).sum()))
    for tops in LINES.values():
        lines = [_words_at(grid_HW == ink, top) for top in tops]
        # If a letter is ambiguous, both words are tried: they tie, so that the image is not read.
        for choice in range(2):
            yield Scene("", background, words=tuple(words[min(choice, len(words) - 1)] for words in lines), ink=ink)


def _thing_at(grid_HW: np.ndarray, place: str, background: str) -> Thing:
    """The shape and colour that explain most cells at a place."""
    left, top = PLACES[place]
    window = grid_HW[top : top + SHAPE_SIDE, left : left + SHAPE_SIDE].ravel()
    colours = list(COLOURS)
    missing_CS = np.array([window != colour for colour in colours], dtype=int) @ _SHAPE_BITS.T.astype(int)
    spilled_S = (~_SHAPE_BITS).astype(int) @ (window != background).astype(int)
    colour, shape = np.unravel_index((missing_CS + spilled_S).argmin(), missing_CS.shape)
    return Thing(colours[colour], list(SHAPES)[shape], place)


def _words_at(inked_HW: np.ndarray, top: int) -> Sequence[str]:
    """The word on a line, and a second one if a letter is ambiguous."""
    first, second = "", ""
    for column in range(LETTERS_IN_A_WORD):
        left = column * LETTER_PITCH
        window = inked_HW[top : top + GLYPH_HEIGHT, left : left + GLYPH_WIDTH].ravel()
        wrong = (window != _GLYPH_BITS).sum(axis=1)
        best = [letter for letter, count in zip(GLYPHS, wrong, strict=True) if count == wrong.min()]
        first, second = first + best[0], second + best[-1]
    return [first] if first == second else [first, second]


def verdict(scene: Scene, image: np.ndarray) -> bool:
    """Whether the image shows the scene, by the scene's task.

    single_object, position: every colour, shape and place, and the background. colour_shape_binding: every colour with its shape,
    wherever it stands. count: how many, of which colour and shape. word, two_words: every letter.
    """
    reading = read(image)
    if reading is None or reading.background != scene.background:
        return False
    if scene.task in ("word", "two_words"):
        return not reading.things and (reading.words, reading.ink) == (scene.words, scene.ink)
    placed = scene.task in ("single_object", "position")
    return not reading.words and _sorted(reading.things, placed) == _sorted(scene.things, placed)


def _sorted(things: Sequence[Thing], placed: bool) -> list[tuple[str, ...]]:
    return sorted((thing.colour, thing.shape, *([thing.place] if placed else [])) for thing in things)
