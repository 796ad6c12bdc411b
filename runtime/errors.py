"""The one exception a user of an encoder file can meet."""

from __future__ import annotations


class StudentFileError(ValueError):
    """A file that cannot be served as a distilled T5: what is wrong, and what to do about it.

    The first line says what is wrong (ComfyUI's error dialog shows it first); the last says what to do.
    """

    # ComfyUI shows the module before the message, and it imports a pack under its whole path.
    __module__ = "distilled_t5"

    def __init__(self, problem: str, remedy: str, details: str = "") -> None:
        lines = [problem, details, f"What to do: {remedy}"]
        # A name that is not valid Unicode, as files may have, cannot be logged or sent.
        super().__init__("\n".join(line for line in lines if line).encode(errors="backslashreplace").decode())
        self.problem = problem
        self.remedy = remedy


def printable(text: str, most: int = 200) -> str:
    """Text from a file on one line: what does not print is escaped, what is longer than `most` is cut."""
    shown = text if len(text) <= most else text[:most] + "..."
    return shown if shown.isprintable() else repr(shown)[1:-1]


def listed(names: list[str], limit: int = 1000) -> str:
    """Names one per line, all of them up to `limit` (no T5 has that many), then how many more there are."""
    shown = [f"  {printable(name)}" for name in names[:limit]]
    rest = len(names) - limit
    return "\n".join(shown + ([f"  ... and {rest} more"] if rest > 0 else []))
