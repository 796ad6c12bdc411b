"""Judging and probing, stopped by a signal: every process leaves, finished work is kept, and nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from distilled_t5.evaluate.processes import Processes, Stopped, progress_bar
from distilled_t5.evaluate.scores import Kept, Unfinished, kept_or_made
from distilled_t5.runtime.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent.parent
DECIDED_BY = {"judge": "a"}


class Work:
    """Squares by number; a signal comes in the middle of the `signal_at`-th of them."""

    def __init__(self, kept: Kept, signal_at: int | None = None) -> None:
        self.kept, self.signal_at, self.done = kept, signal_at, list[int]()
        self.processes = Processes(Ranks(), lambda: len(self.done) == self.signal_at)

    def square(self, number: int) -> list[float]:
        self.done.append(number)
        return [number * number / 3]

    def run(self, decided_by: dict[str, str] | None = None) -> list[list[float]]:
        items = range(5)
        return kept_or_made(
            self.kept,
            Ranks(),
            "student/task",
            DECIDED_BY if decided_by is None else decided_by,
            lambda unfinished: self.processes.map(self.square, items, 5, unfinished),
        )


def test_a_signal_ends_the_work_after_the_item_in_hand_and_the_next_call_does_the_others(tmp_path):
    kept = Kept(tmp_path)
    first = Work(kept, signal_at=2)
    with pytest.raises(Stopped):
        first.run()
    assert first.done == [0, 1]
    second = Work(kept)
    assert second.run() == [[number * number / 3] for number in range(5)]
    assert second.done == [2, 3, 4]
    assert [path.name for path in tmp_path.rglob("*.json")] == ["task.json"], "unfinished work is removed once the finished value is kept"
    assert Work(kept).run() == second.run()
    assert second.done == [2, 3, 4]


def test_two_signals_lose_nothing_either(tmp_path):
    kept, seen = Kept(tmp_path), list[int]()
    for signal_at in (1, 2, None):
        work = Work(kept, signal_at)
        if signal_at is None:
            work.run()
        else:
            with pytest.raises(Stopped):
                work.run()
        seen += work.done
    assert seen == [0, 1, 2, 3, 4]


def test_unfinished_work_of_another_judge_is_not_used(tmp_path):
    with pytest.raises(Stopped):
        Work(Kept(tmp_path), signal_at=2).run()
    other = Work(Kept(tmp_path))
    other.run({"judge": "b"})
    assert other.done == [0, 1, 2, 3, 4]


def test_unfinished_work_of_another_batch_size_is_not_used(tmp_path):
    def batches(size: int) -> list[list[int]]:
        return [list(range(start, min(start + size, 6))) for start in range(0, 6, size)]

    def ask(size: int, signal_at: int | None) -> list[float]:
        work = Work(Kept(tmp_path), signal_at)

        def all_of(unfinished: Unfinished) -> list[float]:
            found = work.processes.map(
                lambda batch: [work.square(one)[0] for one in batch], batches(size), 1, unfinished=unfinished.also_decided_by(batch=size)
            )
            return [one for batch in found for one in batch]

        return kept_or_made(work.kept, Ranks(), "student/task", DECIDED_BY, all_of)

    for size in (3, 2, 1):
        with pytest.raises(Stopped):
            ask(size, signal_at=size)
    assert ask(2, None) == [number * number / 3 for number in range(6)]
    assert [path.name for path in tmp_path.rglob("*.json")] == ["task.json"]


def test_work_that_is_not_kept_starts_over(tmp_path):
    work = Work(Kept(tmp_path), signal_at=2)
    for _ in range(2):
        work.done.clear()
        with pytest.raises(Stopped):
            work.processes.map(work.square, range(5), 5)
        assert work.done == [0, 1]
    assert not list(tmp_path.iterdir())


def test_a_signal_that_comes_in_the_last_item_stops_at_the_next_look(tmp_path):
    work = Work(Kept(tmp_path), signal_at=5)
    assert len(work.run()) == 5
    with pytest.raises(Stopped):
        work.processes.check_stop()


def test_one_bar_counts_all_pieces_and_what_needs_no_work_is_taken_off_its_total():
    bar = progress_bar(Ranks())
    bar.total = 30
    processes = Processes(Ranks(), lambda: False, bar)
    with processes.piece("teacher: images", 10):
        processes.map(abs, range(4), 10)
        assert (bar.n, bar.total) == (10, 30)
    with processes.piece("teacher: kept", 15):
        pass
    assert (bar.n, bar.total, bar.desc) == (10, 15, "teacher: kept: ")
    with processes.piece("student: more than planned", 5):
        processes.map(abs, range(3), 50)
    assert bar.n == bar.total == 15
    assert "left for all of it" in str(bar)


TOGETHER = (
    f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'conftest.py')!r})"
    + """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])

from distilled_t5.evaluate.scores import Kept, kept_or_made
from distilled_t5.evaluate.processes import Processes, Stopped
from distilled_t5.runtime.ranks import Ranks

with Ranks.open("cpu") as ranks:
    told = {"stopped": [], "done": []}
    for signal_at in (2, None):
        done = []
        # Only the second process receives the signal.
        processes = Processes(ranks, lambda: ranks.rank == 1 and len(done) == signal_at)
        work = lambda number: done.append(number) or number * number / 3
        try:
            told["found"] = kept_or_made(Kept(folder), ranks, "a/b", {}, lambda left: processes.map(work, range(9), 9, left))
            told["stopped"].append(False)
        except Stopped:
            told["stopped"].append(True)
        told["done"].append(done)
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(told))
"""
)


@pytest.mark.full
def test_two_processes_leave_together_and_share_out_what_is_left(tmp_path):
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run([*launcher, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one["stopped"] == other["stopped"] == [True, False]
    assert (one["done"][0], other["done"][0]) == ([0, 2], [1, 3]), "none goes on while the other waits"
    assert (one["done"][1], other["done"][1]) == ([4, 6, 8], [5, 7])
    assert one["found"] == other["found"] == [number * number / 3 for number in range(9)]
