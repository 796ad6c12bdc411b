"""The processes of an evaluation: they share work out, and leave it together when a signal asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..runtime.ranks import Ranks

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

        After a signal to one of them no process begins a further item: what is done then goes into `part`, from where the next call takes
        it, and Stopped is raised. Only what JSON can hold may go into a part, and the same items must have the same places.
        """
        ranks = self.ranks
        done: dict[int, Found] = ranks.share(part.read() if part is not None and ranks.is_main else {})
        left = [place for place in range(len(items)) if place not in done]
        rounds = [left[start : start + ranks.world] for start in range(0, len(left), ranks.world)]
        made, stopped = dict[int, Found](), False
        with self.bar(len(left[ranks.rank :: ranks.world]), what, unit) as bar:
            for places in rounds:
                # Before each round all agree: one that left alone would wait for the others until it is taken for lost.
                stopped = ranks.any_of(self.stop())
                if stopped:
                    break
                if ranks.rank < len(places):
                    place = places[ranks.rank]
                    made[place] = work(items[place])
                    bar.update()
        for more in ranks.gather(made):
            done |= more
        if stopped:
            if part is not None and done and ranks.is_main:
                part.write(done)
            ranks.barrier()  # under torchrun the first process that leaves has the others ended
            raise Stopped
        return [done[place] for place in range(len(items))]
