"""The one exception a user of an encoder file can meet."""

from __future__ import annotations


class StudentFileError(ValueError):
    """A file that cannot be served as a distilled T5: what is wrong, and what to do about it.

    The first line says what is wrong (ComfyUI's error dialog shows it first); the last says what to do.
    """

    def __init__(self, problem: str, remedy: str, details: str = "") -> None:
        lines = [problem, details, f"What to do: {remedy}"]
        super().__init__("\n".join(line for line in lines if line))
        self.problem = problem
        self.remedy = remedy


def listed(names: list[str], limit: int = 40) -> str:
    """Names one per line, all of them up to `limit`, then how many more there are."""
    shown = [f"  {name}" for name in names[:limit]]
    rest = len(names) - limit
    return "\n".join(shown + ([f"  ... and {rest} more"] if rest > 0 else []))
