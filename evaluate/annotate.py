"""Drawing: boxes around text that was read, and tables as images."""

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
# Shares of the shorter side of an image; letters are never too small to read.
BOX_SHARE, LABEL_SHARE, LEAST_LABEL_PX = 1 / 256, 1 / 32, 10


def boxes(image_HW3: np.ndarray, lines: Sequence[Line], right: Sequence[bool]) -> np.ndarray:
    """A copy of the image, uint8 [H, W, 3], with a box and the text for every line: green for right ones, red for the others."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(image_HW3)
    draw, shorter = ImageDraw.Draw(image), min(image.size)
    width, font = max(1, round(shorter * BOX_SHARE)), ImageFont.load_default(max(LEAST_LABEL_PX, round(shorter * LABEL_SHARE)))
    for line, is_right in zip(lines, right, strict=True):
        colour = RIGHT if is_right else WRONG
        left, top, to, bottom = line.box_px
        draw.rectangle((left, top, max(left, to), max(top, bottom)), outline=colour, width=width)
        across, down = _size(draw, line.text, font)
        # Above the box, or below it at the top of the image, and never beyond its right edge.
        place = (max(0, min(left, image.width - across)), top - down if top >= down else min(bottom, image.height - down))
        draw.rectangle((*place, place[0] + across, place[1] + down), fill=colour)
        draw.text(place, line.text, fill=PAPER, font=font)
    return np.asarray(image)


def table_image(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> Image.Image:
    """A table with a heading row, its first column aligned left and the others right, and notes in small letters below."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(TABLE_TEXT_PX), ImageFont.load_default(NOTE_PX)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(_size(measure, cell, font)[0] for cell in column) + 2 * GAP_PX for column in zip(*rows, strict=True)]
    row_px, note_px = TABLE_TEXT_PX + 2 * GAP_PX, NOTE_PX + GAP_PX // 2
    width = max(sum(widths), *(_size(measure, note, small)[0] + 2 * GAP_PX for note in (*notes, "")))
    image = Image.new("RGB", (width, row_px * len(rows) + note_px * len(notes) + 2 * GAP_PX), PAPER)
    draw = ImageDraw.Draw(image)
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
    return image


def _size(draw: ImageDraw.ImageDraw, text: str, font: Any) -> tuple[int, int]:
    """Width and line height of a text, pixels."""
    left, _, right, bottom = draw.textbbox((0, 0), text or " ", font=font)
    return math.ceil(right - min(0, left)), math.ceil(bottom) + 2
