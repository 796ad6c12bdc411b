"""Pictures with something drawn on them: boxes around what was read, a table as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from .readers import Line

PAPER, INK, RULE, BAND = (255, 255, 255), (32, 32, 32), (170, 170, 170), (240, 243, 246)
RIGHT, WRONG = (0, 170, 60), (220, 30, 30)
TABLE_TEXT_PX, NOTE_PX, GAP_PX = 18, 14, 10
# Of the shorter side of a picture; never less than a thin line and readable letters.
BOX_SHARE, LABEL_SHARE, LEAST_LABEL_PX = 1 / 256, 1 / 32, 10


def boxes(image_HW3: np.ndarray, lines: Sequence[Line], right: Sequence[bool]) -> np.ndarray:
    """The picture, uint8 [H,W,3], with a box and its text around every line: green for those that are right, red for the others."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(image_HW3)
    draw, shorter = ImageDraw.Draw(picture), min(picture.size)
    width, font = max(1, round(shorter * BOX_SHARE)), ImageFont.load_default(max(LEAST_LABEL_PX, round(shorter * LABEL_SHARE)))
    for line, is_right in zip(lines, right, strict=True):
        colour = RIGHT if is_right else WRONG
        left, top, to, bottom = line.box_px
        draw.rectangle((left, top, max(left, to), max(top, bottom)), outline=colour, width=width)
        across, down = _size(draw, line.text, font)
        # Above the box, or below it where the picture ends, and never out of the picture on the right.
        place = (max(0, min(left, picture.width - across)), top - down if top >= down else min(bottom, picture.height - down))
        draw.rectangle((*place, place[0] + across, place[1] + down), fill=colour)
        draw.text(place, line.text, fill=PAPER, font=font)
    return np.asarray(picture)


def table_picture(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> Image.Image:
    """A table, its first row the heading and its first column to the left, the others to the right, with notes in small letters below."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(TABLE_TEXT_PX), ImageFont.load_default(NOTE_PX)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(_size(measure, cell, font)[0] for cell in column) + 2 * GAP_PX for column in zip(*rows, strict=True)]
    row_px, note_px = TABLE_TEXT_PX + 2 * GAP_PX, NOTE_PX + GAP_PX // 2
    width = max(sum(widths), *(_size(measure, note, small)[0] + 2 * GAP_PX for note in (*notes, "")))
    picture = Image.new("RGB", (width, row_px * len(rows) + note_px * len(notes) + 2 * GAP_PX), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        top, left = GAP_PX + number * row_px, 0
        if number % 2 == 0:
            draw.rectangle((0, top, width, top + row_px - 1), fill=BAND)
        for column, (cell, column_px) in enumerate(zip(row, widths, strict=True)):
            across = left + GAP_PX if column == 0 else left + column_px - GAP_PX - _size(draw, cell, font)[0]
            draw.text((across, top + GAP_PX), cell, fill=INK, font=font)
            left += column_px
    draw.line((0, GAP_PX + row_px, width, GAP_PX + row_px), fill=RULE)
    for number, note in enumerate(notes):
        draw.text((GAP_PX, GAP_PX + row_px * len(rows) + GAP_PX // 2 + number * note_px), note, fill=INK, font=small)
    return picture


def _size(draw: ImageDraw.ImageDraw, text: str, font: Any) -> tuple[int, int]:
    """Pixels across and down of a text, its whole line height."""
    left, _, right, bottom = draw.textbbox((0, 0), text or " ", font=font)
    return math.ceil(right - min(0, left)), math.ceil(bottom) + 2
