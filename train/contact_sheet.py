"""Images side by side: those of teacher and students on the same prompts and seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

GAP_PX, TEXT_PX, LINE_PX = 8, 16, 20
MOST_LINES = 3
PAPER, INK = (255, 255, 255), (32, 32, 32)


def contact_sheet(columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Columns of images under their names, and one row per prompt, headed by its caption. Raises ValueError if their numbers differ."""
    from PIL import Image, ImageDraw, ImageFont

    rows = list(zip(*columns.values(), strict=True))
    if not rows or len(captions) != len(rows):
        raise ValueError(f"A contact sheet needs one caption per row: expected {len(rows)} captions, got {len(captions)}.")
    images = [image for row in rows for image in row]
    font = ImageFont.load_default(TEXT_PX)
    headings = [math.ceil(font.getlength(name)) for name in columns]
    width, height = max(*headings, *(image.width for image in images)), max(image.height for image in images)
    sheet_width = GAP_PX + len(columns) * (width + GAP_PX)
    texts = [_wrapped(caption, round((sheet_width - 2 * GAP_PX) / font.getlength("n"))) for caption in captions]
    row_heights = [LINE_PX * len(lines) + height + 2 * GAP_PX for lines in texts]
    sheet = Image.new("RGB", (sheet_width, GAP_PX + LINE_PX + sum(row_heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [GAP_PX + column * (width + GAP_PX) for column in range(len(columns))]
    for left, name in zip(lefts, columns, strict=True):
        draw.text((left, GAP_PX), name, fill=INK, font=font)
    top = GAP_PX + LINE_PX
    for row, lines, row_height in zip(rows, texts, row_heights, strict=True):
        for number, line in enumerate(lines):
            draw.text((GAP_PX, top + GAP_PX // 2 + number * LINE_PX), line, fill=INK, font=font)
        for left, image in zip(lefts, row, strict=True):
            sheet.paste(image.convert("RGB"), (left, top + GAP_PX + len(lines) * LINE_PX))
        top += row_height
    return sheet


def image_difference(teacher: Image.Image, student: Image.Image) -> Image.Image:
    """The absolute difference of two images of one size: black where they are equal."""
    from PIL import ImageChops

    return ImageChops.difference(teacher.convert("RGB"), student.convert("RGB"))


def _wrapped(caption: str, width: int) -> list[str]:
    return textwrap.wrap(caption, max(8, width), max_lines=MOST_LINES, placeholder=" ...") or [""]
