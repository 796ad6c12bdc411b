"""OCR accuracy: how much of a text that was asked for stands in a picture (section 5.1 of arXiv:2503.19897).

What is compared is normalised first, the text that was asked for and the text that was read alike:

1. compatibility forms become plain ones (Unicode NFKC: ligatures, full-width letters), and case is folded;
2. apostrophes vanish ("don't" is "dont"), every other sign that is no letter, digit or combining mark becomes a space;
3. runs of spaces become one, none stands at an end.

What was read is put into reading order, row by row, and its lines are joined by a space.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .readers import Line

APOSTROPHES = dict.fromkeys(map(ord, "'`\N{RIGHT SINGLE QUOTATION MARK}\N{LEFT SINGLE QUOTATION MARK}\N{MODIFIER LETTER APOSTROPHE}"))


@dataclass(frozen=True)
class OcrScore:
    """Shares in 0..1 of one picture, or their means over `n_pictures`; n_characters and n_words say out of how many in all."""

    character: float
    word: float
    sentence: float
    n_characters: int
    n_words: int
    n_pictures: int = 1


def normalised(text: str) -> str:
    """The text as it is compared; the rules stand at the top of this file."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).translate(APOSTROPHES)
    return " ".join("".join(sign if unicodedata.category(sign)[0] in "LNM" else " " for sign in folded).split())


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Lines from top to bottom, and from left to right where the middle of one lies above the foot of its row's first."""
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: line.box_px[1] + line.box_px[3]):
        first = rows[-1][0] if rows else None
        if first is not None and line.box_px[1] + line.box_px[3] < 2 * first.box_px[3]:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.box_px[0])]


def read_text(lines: Sequence[Line]) -> str:
    """What was read, in reading order, normalised."""
    return normalised(" ".join(line.text for line in reading_order(lines)))


def character_accuracy(target: str, detected: str) -> float:
    """The share of the target's characters that stand at their own place in the detection, which is cropped or padded to its length."""
    return sum(wanted == found for wanted, found in zip(target, detected, strict=False)) / len(target)


def word_accuracy(target: str, detected: str) -> float:
    """The share of the target's words that the detection contains as whole words, each as often as it is asked for."""
    wanted = Counter(target.split())
    return (wanted & Counter(detected.split())).total() / wanted.total()


def contains_sentence(target: str, detected: str) -> bool:
    """Whether the detection contains all of the target's words, next to each other and in their order."""
    return f" {target} " in f" {detected} "


def score(expected: str, lines: Sequence[Line]) -> OcrScore:
    """How much of the expected text was read. Raises ValueError if there is no letter or digit in it."""
    target, detected = normalised(expected), read_text(lines)
    if not target:
        raise ValueError(
            f"The expected text must have at least one letter or digit; {expected!r} came.\n"
            "What to do: give the words that the picture should show."
        )
    sentence = float(contains_sentence(target, detected))
    words = word_accuracy(target, detected)
    return OcrScore(character_accuracy(target, detected), words, sentence, len(target), len(target.split()))


def mean(scores: Sequence[OcrScore]) -> OcrScore:
    """The means over pictures, each of which counts the same. Raises ValueError if there is none."""
    if not scores:
        raise ValueError("A mean of OCR scores needs at least one picture; none came.\nWhat to do: score at least one picture.")
    pictures = sum(one.n_pictures for one in scores)
    character, word, sentence = (
        math.fsum(getattr(one, share) * one.n_pictures for one in scores) / pictures for share in ("character", "word", "sentence")
    )
    return OcrScore(character, word, sentence, sum(one.n_characters for one in scores), sum(one.n_words for one in scores), pictures)


def belongs(expected: str, line: Line) -> bool:
    """Whether a line holds words of the expected text and no others, so that it can be drawn as right."""
    words = normalised(line.text).split()
    return bool(words) and set(words) <= set(normalised(expected).split())
