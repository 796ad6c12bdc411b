"""An evaluation that is stopped at every look at the signal: it ends with the same numbers, and judges and probes nothing twice."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.evaluate import probes, verdicts
from distilled_t5.evaluate.measure import measure_all
from distilled_t5.evaluate.run import evaluate, open_evaluation
from distilled_t5.evaluate.suite import Suite, load_suite
from distilled_t5.evaluate.team import Stopped
from distilled_t5.runtime.model_folders import add_model_folders
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.runtime.stop import StopRequest
from distilled_t5.tests.support.evaluation_world import write_world

STUDENTS = ["other.safetensors"]
PICTURES, ENCODERS, BATCHES = 16, 3, 2


class Looks(StopRequest):
    """A signal that comes after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def counted(done: Counter[str], name: str, work: Callable[..., Any], size: Callable[..., int] = lambda *_: 1) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        done[name] += size(*arguments)
        return work(*arguments)

    return call


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """The small suite without costs, which no two runs share."""
    path = write_world(tmp_path)
    add_model_folders(tmp_path / "models")
    return load_suite(str(path)).model_copy(update={"cost": None})


def numbers(suite: Suite, out: Path, stop: StopRequest) -> tuple[Any, Any]:
    work = open_evaluation(suite, STUDENTS, out, Ranks(), stop)
    judged, measured = verdicts.judge_all(work), measure_all(work)
    return judged.pictures, measured.numbers


def test_stopped_at_every_look_it_ends_with_the_same_and_does_nothing_twice(suite, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert evaluate(suite, STUDENTS, whole, Ranks()) is not None
    expected = numbers(suite, whole, StopRequest())
    shutil.copytree(whole / "pictures", out / "pictures")

    done, judge_of = Counter[str](), verdicts.make_judge
    monkeypatch.setattr(verdicts, "AT_ONCE", 2)
    monkeypatch.setattr(verdicts, "make_judge", lambda *given: counted(done, "judged", judge_of(*given), lambda asked, *_: len(asked)))
    monkeypatch.setattr(probes, "_gap_of_batch", counted(done, "gaps", probes._gap_of_batch))
    monkeypatch.setattr(probes, "_way_apart", counted(done, "ways", probes._way_apart))
    found, stops = None, 0
    while found is None:
        try:
            found = numbers(suite, out, Looks(stops))
        except Stopped:
            stops += 1
            assert stops < 300
    assert stops > 20
    assert found == expected
    assert done == {"judged": PICTURES * ENCODERS, "gaps": BATCHES * (ENCODERS - 1), "ways": BATCHES * (ENCODERS - 1)}
    assert not list(out.rglob("*.part.json"))
