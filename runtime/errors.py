"""Errors with advice, and text that can be printed."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's: the first line says what is wrong, the last what to do."""

    def __init__(self, problem: str, remedy: str, details: str = "") -> None:
        self.problem, self.remedy = escaped(problem), escaped(remedy)
        lines = [self.problem, escaped(details), f"What to do: {self.remedy}"]
        super().__init__("\n".join(line for line in lines if line))


class StudentFileError(UserError):
    """A file that cannot be used as a distilled T5."""

    # ComfyUI shows the module before the message, and imports a pack under its full path.
    __module__ = "distilled_t5"


class UndistilledError(StudentFileError):
    """A network that students replace, such as T5-XXL itself, where a student was expected."""


def escaped(text: str) -> str:
    """The text with unprintable characters escaped, except for line breaks: a name that is not valid Unicode cannot be logged or sent."""
    return "\n".join(line if line.isprintable() else repr(line)[1:-1] for line in text.split("\n"))


def printable(text: str, most: int = 200) -> str:
    """Text from a file on one line: unprintable characters are escaped, and it is cut to `most` characters."""
    shown = text if len(text) <= most else text[:most] + "..."
    return shown if shown.isprintable() else repr(shown)[1:-1]


def listed(names: list[str], limit: int = 1000) -> str:
    """Names one per line, at most `limit` (more than any T5 has), then how many more there are."""
    shown = [f"  {printable(name)}" for name in names[:limit]]
    rest = len(names) - limit
    return "\n".join(shown + ([f"  ... and {rest} more"] if rest > 0 else []))
