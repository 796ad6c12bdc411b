"""The processes of an evaluation: they share work out, and leave it together when a signal asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..train.ranks import Ranks

if TYPE_CHECKING:
    from tqdm import tqdm

    from .scores import Part

Item = TypeVar("Item")
Found = TypeVar("Found")


class Stopped(Exception):
    """A signal asked to stop, and every process leaves; the same command goes on."""


@dataclass(frozen=True)
class Team:
    """The processes, their progress bar, `bar(items of this process, what it does, unit)`, and whether a signal asked this one to stop."""

    ranks: Ranks
    bar: Callable[[int, str, str], tqdm]
    stop: Callable[[], bool]

    def leave_if_asked(self) -> None:
        """Raise Stopped on all processes if a signal reached one of them."""
        if self.ranks.any_of(self.stop()):
            raise Stopped

    def share_out(
        self, items: Sequence[Item], work: Callable[[Item], Found], what: str, unit: str = "batch", part: Part | None = None
    ) -> list[Found]:
        """What `work` makes of each item, in their order, on every process; each process does its own part.

        After a signal no further item is begun: what is done then goes into `part`, from where the next call takes it, and Stopped is
        raised. Only what JSON can hold may go into a part.
        """
        done: dict[int, Found] = self.ranks.share(part.read() if part is not None and self.ranks.is_main else {})
        left = [place for place in range(len(items)) if place not in done]
        for made in self.ranks.gather(self._own_share(left, items, work, what, unit)):
            done |= made
        if len(done) == len(items):
            return [done[place] for place in range(len(items))]
        if part is not None and self.ranks.is_main:
            part.write(done)
        raise Stopped

    def _own_share(
        self, left: Sequence[int], items: Sequence[Item], work: Callable[[Item], Found], what: str, unit: str
    ) -> dict[int, Found]:
        """What this process makes of its items before a signal, by their places."""
        mine, made = left[self.ranks.rank :: self.ranks.world], dict[int, Found]()
        with self.bar(len(mine), what, unit) as bar:
            for place in mine:
                if self.stop():
                    break
                made[place] = work(items[place])
                bar.update()
        return made
