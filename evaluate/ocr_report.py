"""Images compared with the text that they must show: the scores, the images with boxes, and a text report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.progress import Progress
from .annotate import boxes
from .ocr import OcrScore, belongs, mean, normalised, reading_order, score
from .readers import Line, make_reader


@dataclass(frozen=True)
class OcrReport:
    """The mean score, the images, uint8 [H, W, 3], with green and red boxes, and a line of text for each."""

    score: OcrScore
    images: list[np.ndarray]
    text: str


def read_images(images: Sequence[np.ndarray], expected: str, reader: str, device: str, progress: Progress) -> OcrReport:
    """Read RGB images, uint8 [H, W, 3], with a reader by name on a device of torch; `progress(done, total)` may raise to cancel.

    Raises ValueError.
    """
    progress(0, len(images))
    score(expected, [])  # before a reader is loaded for a text that is refused
    reads, found = make_reader(reader, device=device), list[list[Line]]()
    for done, image in enumerate(images):
        progress(done, len(images))
        found.append(reading_order(reads.read(image)))
    progress(len(images), len(images))
    scores = [score(expected, lines) for lines in found]
    drawn = [boxes(image, lines, [belongs(expected, line) for line in lines]) for image, lines in zip(images, found, strict=True)]
    return OcrReport(mean(scores), drawn, in_words(expected, reader, found, scores))


def in_words(expected: str, reader: str, found: Sequence[Sequence[Line]], scores: Sequence[OcrScore]) -> str:
    """What was read in each image with its scores, and their mean."""
    lines = [f"expected: {normalised(expected)}"]
    for number, (read, each) in enumerate(zip(found, scores, strict=True), start=1):
        text = " / ".join(line.text for line in read) or "no text"
        lines.append(f"image {number}: {_percent(each)} | {reader} read: {text}")
    return "\n".join([*lines, f"mean of {len(scores)}: {_percent(mean(scores))}"])


def _percent(score_: OcrScore) -> str:
    return f"characters {100 * score_.character:.1f} %, words {100 * score_.word:.1f} %, sentence {100 * score_.sentence:.1f} %"
