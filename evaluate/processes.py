"""The processes of an evaluation: they share work, and stop together when a signal asks one of them to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

from ..runtime.logs import FILE_INTERVAL_S, TERMINAL_INTERVAL_S
from ..runtime.ranks import Ranks
from .scores import Unfinished

BAR = "{desc}{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left for all of it"
Item = TypeVar("Item")
Found = TypeVar("Found")


class Stopped(Exception):
    """A signal asked to stop, and every process leaves; the same command continues."""


def progress_bar(ranks: Ranks) -> tqdm:
    """The bar of all the work, counted in images, with one time left for all of it; the first process shows it."""
    interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else FILE_INTERVAL_S
    return tqdm(total=1, bar_format=BAR, mininterval=interval_s, smoothing=0, dynamic_ncols=True, disable=not ranks.is_main)


@dataclass(frozen=True)
class Processes:
    """The processes of an evaluation, whether a signal asked this one to stop, and one progress bar for all its work."""

    ranks: Ranks
    stop: Callable[[], bool]
    bar: tqdm = field(default_factory=lambda: tqdm(disable=True))

    @contextlib.contextmanager
    def piece(self, what: str, images: float) -> Iterator[None]:
        """A piece of the work that takes as long as so many images. What it did not need to do is taken off the total in the end."""
        self.bar.set_description(what, refresh=False)
        before = self.bar.n
        yield
        self.bar.total = max(self.bar.n, (self.bar.total or 0) - images / self.ranks.world + self.bar.n - before)

    def advance(self, images: float) -> None:
        """Count work that takes as long as so many images as done."""
        self.bar.update(min(images, (self.bar.total or 0) - self.bar.n))

    def check_stop(self) -> None:
        """Raise Stopped on all processes if a signal reached one of them."""
        if self.ranks.any_of(self.stop()):
            raise Stopped

    def map(self, work: Callable[[Item], Found], items: Sequence[Item], images: float, unfinished: Unfinished | None = None) -> list[Found]:
        """`work` of each item, in order, on every process; the processes share the items, which take as long as so many images.

        After a signal no process begins another item: what is done is written to `unfinished`, where the next call finds it, and Stopped
        is raised. `unfinished` takes only what JSON can hold, and needs the same items in the same order.
        """
        ranks = self.ranks
        done: dict[int, Found] = ranks.share(unfinished.read() if unfinished is not None and ranks.is_main else {})
        left = [place for place in range(len(items)) if place not in done]
        rounds = [left[start : start + ranks.world] for start in range(0, len(left), ranks.world)]
        made, stopped = dict[int, Found](), False
        for places in rounds:
            # All agree before each round: one that left alone would keep the others waiting until they count it as lost.
            stopped = ranks.any_of(self.stop())
            if stopped:
                break
            if ranks.rank < len(places):
                made[places[ranks.rank]] = work(items[places[ranks.rank]])
                self.advance(images / len(items))
        for more in ranks.gather(made):
            done |= more
        if stopped:
            if unfinished is not None and done and ranks.is_main:
                unfinished.write(done)
            ranks.barrier()  # under torchrun the first process that leaves ends the others
            raise Stopped
        return [done[place] for place in range(len(items))]
