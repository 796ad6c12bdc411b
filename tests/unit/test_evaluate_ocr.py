"""OCR accuracy: every kind of error that a reader can make, counted by hand."""

from __future__ import annotations

import pytest
from distilled_t5.evaluate.ocr import OcrScore, belongs, mean, normalised, read_text, reading_order, score
from distilled_t5.evaluate.readers import Line


def line(text: str, left: int = 0, top: int = 0, width: int = 100, height: int = 20) -> Line:
    return Line(text, (left, top, left + width, top + height), 1.0)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Fresh BREAD", "fresh bread"),
        ("  fresh \n\t bread ", "fresh bread"),
        ("Don't stop!", "dont stop"),
        ("Don\N{RIGHT SINGLE QUOTATION MARK}t", "dont"),
        ("half-price, $9.99 (today)", "half price 9 99 today"),
        ("Stra\N{LATIN SMALL LETTER SHARP S}e", "strasse"),
        ("\N{LATIN SMALL LIGATURE FI}ne \N{FULLWIDTH LATIN CAPITAL LETTER A}", "fine a"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
        ("snake_case", "snake case"),
        ("!?", ""),
    ],
)
def test_normalisation(text, same):
    assert normalised(text) == same
    assert normalised(same) == same


@pytest.mark.parametrize(
    ("kind", "expected", "read", "character", "word", "sentence"),
    [
        ("all right", "open now", "open now", 1, 1, 1),
        ("case and punctuation do not count", "Open now!", "OPEN NOW", 1, 1, 1),
        ("nothing was read", "open now", "", 0, 0, 0),
        ("a character is another", "open now", "opem now", 7 / 8, 1 / 2, 0),
        ("a character is missing, so all after it stand elsewhere", "open now", "pen now", 0, 1 / 2, 0),
        ("a character too many at the end is cropped", "open now", "open nowt", 1, 1 / 2, 0),
        ("a character too many in front shifts all others", "open now", "xopen now", 0, 1 / 2, 0),
        ("a character too many in the middle shifts those after it", "open now", "oppen now", 2 / 8, 1 / 2, 0),
        ("the end is missing and padded", "open now", "open", 4 / 8, 1 / 2, 0),
        ("a word is missing", "open right now", "open now", 5 / 14, 2 / 3, 0),
        ("a word too many at the end", "open now", "open now sir", 1, 1, 1),
        ("a word too many in front", "open now", "we open now", 0, 1, 1),
        ("a word too many between", "open now", "open right now", 5 / 8, 1, 0),
        ("words are exchanged", "open now", "now open", 0, 1, 0),
        ("words run together", "open now", "opennow", 4 / 8, 0, 0),
        ("a word is torn", "open now", "op en now", 2 / 8, 1 / 2, 0),
        ("a word inside another is not that word", "pen", "open", 0, 0, 0),
        ("a word asked for twice must be seen twice", "bye bye", "bye", 3 / 7, 1 / 2, 0),
        ("a word seen twice is still one", "bye", "bye bye", 1, 1, 1),
    ],
)
def test_errors_of_every_kind(kind, expected, read, character, word, sentence):
    found = score(expected, [line(read)])
    assert (found.character, found.word, found.sentence) == pytest.approx((character, word, sentence)), kind


def test_lines_are_read_row_by_row_whatever_their_order():
    top_left, top_right, bottom = line("open", 10, 12), line("right", 120, 4), line("now", 0, 40)
    for lines in ([bottom, top_right, top_left], [top_left, bottom, top_right], [top_right, top_left, bottom]):
        assert read_text(lines) == "open right now"
    assert score("open right now", [bottom, top_right, top_left]).sentence == 1
    assert reading_order([]) == []


def test_touching_lines_are_two_rows_and_a_small_word_beside_a_big_one_is_one():
    assert read_text([line("low", 0, 20), line("high", 300, 0)]) == "high low"
    assert read_text([line("small", 300, 40, height=10), line("BIG", 0, 0, height=80)]) == "big small"


def test_a_text_without_a_letter_is_refused():
    for text in ("", "  ", "?!"):
        with pytest.raises(ValueError, match=r"at least one letter or digit(.|\n)*What to do"):
            score(text, [line("open")])


def test_the_mean_counts_each_image_once():
    assert mean([OcrScore(1, 1, 1), OcrScore(0, 0.5, 0)]) == OcrScore(0.5, 0.75, 0.5)
    with pytest.raises(ValueError, match="at least one image"):
        mean([])


def test_a_line_belongs_if_all_its_words_were_asked_for():
    assert belongs("Open right now", line("OPEN now!"))
    assert not belongs("Open right now", line("open nov"))
    assert not belongs("Open right now", line("--"))
