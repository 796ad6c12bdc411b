"""OCR Accuracy."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ..evaluate.readers import READERS
from .progress import progress_bar
from .show import image_of, pictures_of, shown


class DistilledT5OCRAccuracy(io.ComfyNode):
    """Reads the text in images and compares it with the expected text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DistilledT5OCRAccuracy",
            display_name="Distilled T5 OCR Accuracy",
            category="Distilled T5",
            description=(
                "Reads the text in images and reports how much of the expected text is there: share of characters, of words, and complete "
                "sentences, as the paper on the distilled T5 counts them. Boxes show what was read, green where it belongs to the text."
            ),
            search_aliases=["OCR", "read text", "text rendering accuracy", "EasyOCR", "Tesseract", "spelling check"],
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The images, all with the same expected text."),
                io.String.Input("expected", multiline=True, tooltip="What the image should show. Case and punctuation do not count."),
                io.Combo.Input(
                    "reader",
                    options=list(READERS),
                    default="easyocr",
                    tooltip="easyocr, as in the paper: pip install easyocr, and its weights. tesseract: a program of the system.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="character", tooltip="Share of characters in the right place, 0 to 1, mean of all images."),
                io.Float.Output(display_name="word", tooltip="Share of words that were read, 0 to 1, mean of all images."),
                io.Float.Output(display_name="sentence", tooltip="Share of images in which the complete text was read, 0 to 1."),
                io.Image.Output(display_name="IMAGE", tooltip="The images with a box around each line: green belongs, red does not."),
                io.String.Output(display_name="report", tooltip="What was read in each image, and the scores, as text."),
            ],
        )

    @classmethod
    def execute(cls, image: Any, expected: str, reader: str) -> io.NodeOutput:
        from ..evaluate.ocr_report import read_images

        device = str(comfy.model_management.get_torch_device())
        found = read_images(pictures_of(image), expected, reader, device, progress_bar())
        drawn, score = torch.cat([image_of(picture) for picture in found.images]), found.score
        return io.NodeOutput(score.character, score.word, score.sentence, drawn, found.text, ui=shown(drawn, found.text, cls))
