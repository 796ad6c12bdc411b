"""An evaluation that is stopped at every look at the signal: it ends with the same numbers, and judges and probes nothing twice."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.evaluate import judge_images, probes
from distilled_t5.evaluate.probe_encoders import measure_all
from distilled_t5.evaluate.processes import Processes, Stopped
from distilled_t5.evaluate.run import evaluate, start
from distilled_t5.evaluate.suite import Suite, load_suite
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
    work = start(suite, STUDENTS, out, Processes(Ranks(), lambda: stop.requested))
    judged, measured = judge_images.judge_all(work), measure_all(work)
    return judged.images, measured.numbers


@pytest.mark.full
def test_stopped_at_every_look_it_ends_with_the_same_and_does_nothing_twice(suite, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert evaluate(suite, STUDENTS, whole, Ranks()) is not None
    expected = numbers(suite, whole, StopRequest())
    shutil.copytree(whole / "images", out / "images")

    done, judge_of = Counter[str](), judge_images.make_judge
    monkeypatch.setattr(judge_images, "AT_ONCE", 2)
    monkeypatch.setattr(judge_images, "make_judge", lambda *given: counted(done, "judged", judge_of(*given), lambda asked, *_: len(asked)))
    monkeypatch.setattr(probes, "_gap_of_batch", counted(done, "gaps", probes._gap_of_batch))
    monkeypatch.setattr(probes, "_distance_of_batch", counted(done, "distances", probes._distance_of_batch))
    found, stops = None, 0
    while found is None:
        try:
            found = numbers(suite, out, Looks(stops))
        except Stopped:
            stops += 1
            assert stops < 300
    assert stops > 20
    assert found == expected
    assert done == {"judged": PICTURES * ENCODERS, "gaps": BATCHES * (ENCODERS - 1), "distances": BATCHES * (ENCODERS - 1)}
    assert not list(out.rglob("*.part.json"))
