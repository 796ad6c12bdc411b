"""OCR accuracy: how much of the expected text is in an image (section 5.1 of arXiv:2503.19897).

The expected text and the text that was read are both normalised first:

1. compatibility forms become plain ones (Unicode NFKC: ligatures, full-width letters), and case is folded;
2. apostrophes are removed ("don't" is "dont"), every other character that is not a letter, digit or combining mark becomes a space;
3. runs of spaces become one, and spaces at either end are removed.

Lines that were read are sorted into reading order, row by row, and joined by a space.
"""

from __future__ import annotations

import statistics
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .readers import Line

APOSTROPHES = dict.fromkeys(map(ord, "'`\N{RIGHT SINGLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}"))


@dataclass(frozen=True)
class OcrScore:
    """Shares in 0..1 of one image, or their means over several."""

    character: float
    word: float
    sentence: float


def normalised(text: str) -> str:
    """The text as it is compared; the rules are at the top of this file."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(APOSTROPHES)
    return " ".join("".join(sign if unicodedata.category(sign)[0] in "LNM" else " " for sign in folded).split())


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Lines from top to bottom; lines are in one row, from left to right, if their middle is above the bottom of its first line."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.box_px[1] + line.box_px[3]):
        first = rows[-1][0] if rows else None
        if first is not None and line.box_px[1] + line.box_px[3] < 2 * first.box_px[3]:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box_px[0])]


def read_text(lines: Sequence[Line]) -> str:
    """The text of the lines, in reading order, normalised."""
    return normalised(" ".join(line.text for line in reading_order(lines)))


def character_accuracy(target: str, detected: str) -> float:
    """The share of the target's characters that are at the same position in the detection, cropped or padded to its length."""
    return sum(wanted == found for wanted, found in zip(target, detected, strict=False)) / len(target)


def word_accuracy(target: str, detected: str) -> float:
    """The share of the target's words that are words of the detection, each counted as often as the target has it."""
    wanted = Counter(target.split())
    return (wanted & Counter(detected.split())).total() / wanted.total()


def contains_sentence(target: str, detected: str) -> bool:
    """Whether the detection contains all of the target's words, consecutively and in order."""
    return f" {target} " in f" {detected} "


def score(expected: str, lines: Sequence[Line]) -> OcrScore:
    """How much of the expected text was read. Raises ValueError if there is no letter or digit in it."""
    target, detected = normalised(expected), read_text(lines)
    if not target:
        raise ValueError(
            f"The expected text must have at least one letter or digit: got {expected!r}.\n"
            "What to do: give the words that the image must show."
        )
    sentence = float(contains_sentence(target, detected))
    words = word_accuracy(target, detected)
    return OcrScore(character_accuracy(target, detected), words, sentence)


def mean(scores: Sequence[OcrScore]) -> OcrScore:
    """The means over images, equally weighted. Raises ValueError if there are none."""
    if not scores:
        raise ValueError("A mean of OCR scores needs at least one image: got none.\nWhat to do: score at least one image.")
    return OcrScore(*(statistics.fmean(getattr(one, share) for one in scores) for share in ("character", "word", "sentence")))


def belongs(expected: str, line: Line) -> bool:
    """Whether a line has words of the expected text and no others, so that it is drawn as right."""
    words = normalised(line.text).split()
    return bool(words) and set(words) <= set(normalised(expected).split())
