"""Progress of a piece of work, and the chance to cancel it."""

from __future__ import annotations

from collections.abc import Callable

# Called with (done, total) between pieces of work; it may raise to cancel.
Progress = Callable[[int, int], None]


def silent(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


def waiting(progress: Progress, total: int) -> Progress:
    """Progress of preparations, whatever their own size: nothing of `total` is done yet."""
    return lambda _done, _total: progress(0, total)
