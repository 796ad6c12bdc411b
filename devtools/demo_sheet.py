"""The contact sheet of the demo: a row per prompt, a column per encoder, and the reader's verdict under each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..world.pictures import Scene
from ..world.reader import read, verdict

IMAGE_PX, GAP_PX, LINE_PX, TEXT_PX, CAPTION_PX, BLOCKS = 168, 12, 18, 13, 200, 2
ROW_PX = IMAGE_PX + LINE_PX + GAP_PX
PAPER, INK, RIGHT, WRONG = (255, 255, 255), (32, 32, 32), (0, 120, 50), (190, 30, 30)


def pixels(image: Image.Image) -> np.ndarray:
    """An image as an array [H, W, 3] from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def verdict_text(scene: Scene, image: Image.Image) -> str:
    """The verdict: right, or what the image shows instead."""
    if verdict(scene, pixels(image)):
        return "right"
    reading = read(pixels(image))
    if reading is None:
        return "wrong: nothing readable"
    if reading.words:
        return f"wrong: {reading.ink} {' '.join(reading.words)}, {reading.background}"
    shown = ", ".join(f"{thing.colour} {thing.shape}" for thing in reading.things)
    return f"wrong: {shown or 'empty'}, {reading.background}"


def verdict_sheet(questions: Sequence[tuple[Scene, str]], columns: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """The sheet of the images [encoder][question]. Questions are in two blocks side by side."""
    font = ImageFont.load_default(TEXT_PX)
    rows = -(-len(questions) // BLOCKS)
    block_px = CAPTION_PX + len(columns) * (IMAGE_PX + GAP_PX) + GAP_PX
    titles = [_broken(name.replace("_", " "), font, IMAGE_PX) for name in columns]
    head_px = GAP_PX + LINE_PX * max(title.count("\n") + 1 for title in titles)
    sheet = Image.new("RGB", (BLOCKS * block_px, head_px + ROW_PX * rows), PAPER)
    draw = ImageDraw.Draw(sheet)
    for block in range(BLOCKS):
        for number, title in enumerate(titles):
            draw.multiline_text((block * block_px + _left(number), GAP_PX), title, fill=INK, font=font)
    for index, (scene, caption) in enumerate(questions):
        left, top = index // rows * block_px, head_px + index % rows * ROW_PX
        draw.multiline_text((left + GAP_PX, top), _broken(caption, font, CAPTION_PX - 2 * GAP_PX), fill=INK, font=font)
        for number, images in enumerate(columns.values()):
            shown = images[index].convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.NEAREST)
            sheet.paste(shown, (left + _left(number), top))
            said = verdict_text(scene, images[index])
            colour = RIGHT if said == "right" else WRONG
            draw.text((left + _left(number), top + IMAGE_PX + 1), _short(said, font), fill=colour, font=font)
    return sheet


def _left(column: int) -> int:
    return CAPTION_PX + column * (IMAGE_PX + GAP_PX)


def _short(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while font.getlength(text) > IMAGE_PX:
        text = text[:-4] + "..."
    return text


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    """The text, wrapped to a width."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width_px:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
