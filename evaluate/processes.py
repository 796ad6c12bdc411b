"""The processes of an evaluation: they share work, and stop together when a signal asks one of them to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

from ..runtime.logs import FILE_INTERVAL_S, TERMINAL_INTERVAL_S
from ..runtime.ranks import Ranks
from .scores import Unfinished

Item = TypeVar("Item")
Found = TypeVar("Found")


class Stopped(Exception):
    """A signal asked to stop, and every process leaves; the same command continues."""


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, and whether a signal asked this one to stop."""

    ranks: Ranks
    stop: Callable[[], bool]

    def bar(self, total: int, what: str, unit: str) -> tqdm:
        """A progress bar with the time left, shown by the first process for its own share."""
        described = what if self.ranks.world == 1 else f"{what} (process 1 of {self.ranks.world})"
        interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else FILE_INTERVAL_S
        return tqdm(total=total, desc=described, unit=unit, mininterval=interval_s, dynamic_ncols=True, disable=not self.ranks.is_main)

    def check_stop(self) -> None:
        """Raise Stopped on all processes if a signal reached one of them."""
        if self.ranks.any_of(self.stop()):
            raise Stopped

    def map(
        self, work: Callable[[Item], Found], items: Sequence[Item], what: str, unit: str = "batch", unfinished: Unfinished | None = None
    ) -> list[Found]:
        """`work` of each item, in order, on every process; the processes share the items.

        After a signal no process begins another item: what is done is written to `unfinished`, where the next call finds it, and Stopped
        is raised. `unfinished` takes only what JSON can hold, and needs the same items in the same order.
        """
        ranks = self.ranks
        done: dict[int, Found] = ranks.share(unfinished.read() if unfinished is not None and ranks.is_main else {})
        left = [place for place in range(len(items)) if place not in done]
        rounds = [left[start : start + ranks.world] for start in range(0, len(left), ranks.world)]
        made, stopped = dict[int, Found](), False
        with self.bar(len(left[ranks.rank :: ranks.world]), what, unit) as bar:
            for places in rounds:
                # All agree before each round: one that left alone would keep the others waiting until they count it as lost.
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
            if unfinished is not None and done and ranks.is_main:
                unfinished.write(done)
            ranks.barrier()  # under torchrun the first process that leaves ends the others
            raise Stopped
        return [done[place] for place in range(len(items))]
