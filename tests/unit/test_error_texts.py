"""Text from files and names in messages: printable, on one line, and cut."""

from __future__ import annotations

from distilled_t5.runtime.errors import UserError, printable


def test_text_from_a_file_is_shown_on_one_line_escaped_and_cut():
    assert printable("a\udcff\nb") == "a\\udcff\\nb"
    assert printable("Bär \u732b") == "Bär \u732b"
    assert printable("x" * 201) == "x" * 200 + "..."


def test_an_error_carries_only_what_can_be_printed():
    message = str(UserError("a\ud800", "b\udcff", "c\x00\nd"))
    assert message.encode() and message == "a\\ud800\nc\\x00\nd\nWhat to do: b\\udcff"
