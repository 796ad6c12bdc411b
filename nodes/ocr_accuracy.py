"""OCR Accuracy."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..evaluate.annotate import boxes
from ..evaluate.ocr import OcrScore, belongs, mean, normalised, reading_order, score
from ..evaluate.readers import READERS, Line, make_reader
from .progress import progress_bar
from .show import image_of, pictures_of, shown


class DistilledT5OCRAccuracy(io.ComfyNode):
    """Reads the text in pictures and compares it with the text that was asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5OCRAccuracy",
            display_name="Distilled T5 OCR Accuracy",
            category="Distilled T5",
            description=(
                "Reads the text in pictures and says how much of the expected text is there: share of characters, of words, and whole "
                "sentences, as the paper on the distilled T5 counts them. Boxes show what was read, green where it belongs to the text."
            ),
            search_aliases=["OCR", "read text", "text rendering accuracy", "EasyOCR", "Tesseract", "spelling check"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The pictures, all with the same expected text."),
                io.String.Input(
                    "expected", multiline=True, tooltip="What should be written in the picture. Case and punctuation do not count."
                ),
                io.Combo.Input(
                    "reader",
                    options=list(READERS),
                    default="easyocr",
                    tooltip="easyocr, as in the paper: pip install easyocr, and its weights. tesseract: a program of the system.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="character", tooltip="Share of characters that stand in their place, 0 to 1, mean of all pictures."
                ),
                io.Float.Output(display_name="word", tooltip="Share of words that were read, 0 to 1, mean of all pictures."),
                io.Float.Output(display_name="sentence", tooltip="Share of pictures in which the whole text was read, 0 to 1."),
                io.Image.Output(display_name="IMAGE", tooltip="The pictures with a box around each line: green belongs, red does not."),
                io.String.Output(display_name="report", tooltip="What was read in each picture, and the scores, as text."),
            ],
        )

    @classmethod
    def execute(cls, image: Any, expected: str, reader: str) -> io.NodeOutput:
        show, pictures = progress_bar(), pictures_of(image)
        show(0, len(pictures))
        score(expected, [])  # before a reader is loaded for a text that cannot be compared
        reads, found = make_reader(reader), []
        for number, picture in enumerate(pictures):
            show(number, len(pictures))
            found.append(reading_order(reads.read(picture)))
        show(len(pictures), len(pictures))
        scores = [score(expected, lines) for lines in found]
        drawn = [boxes(picture, lines, [belongs(expected, line) for line in lines]) for picture, lines in zip(pictures, found, strict=True)]
        whole, report = mean(scores), report_of(expected, reader, found, scores)
        image = torch.cat([image_of(picture) for picture in drawn])
        return io.NodeOutput(whole.character, whole.word, whole.sentence, image, report, ui=shown(image, report, cls))


def report_of(expected: str, reader: str, found: list[list[Line]], scores: list[OcrScore]) -> str:
    """A line for each picture, and their mean."""
    lines = [f"expected: {normalised(expected)}"]
    for number, (read, each) in enumerate(zip(found, scores, strict=True), start=1):
        text = " / ".join(line.text for line in read) or "no text"
        lines.append(f"picture {number}: {_percent(each)} | {reader} read: {text}")
    return "\n".join([*lines, f"mean of {len(scores)}: {_percent(mean(scores))}"])


def _percent(score_: OcrScore) -> str:
    return f"characters {100 * score_.character:.1f} %, words {100 * score_.word:.1f} %, sentence {100 * score_.sentence:.1f} %"
