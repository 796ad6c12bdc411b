"""The sequence of the overnight recipes on small models: encode once, imitate, follow early, follow; ended anywhere, with the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.cache_runs import StopAfter
from distilled_t5.tests.support.overnight import BOUNDARIES, STEPS, check_same_run, small_overnight
from distilled_t5.tests.support.trainer import BOUND_S, command, finish, metrics, on_accelerator, start
from distilled_t5.train.batches import Schedule
from distilled_t5.train.cache_plan import wanted
from distilled_t5.train.recipe import Recipe
from distilled_t5.train.run import train
from distilled_t5.train.state import resumed_step

FEW = (4, 4, 2)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and a run of few steps with it in one go."""
    folder = tmp_path_factory.mktemp("few")
    assert train(small_overnight(folder / "cache", FEW), folder / "run", False, Ranks()) is not None
    return folder


def needed(recipe: Recipe, step: int) -> int:
    return len(wanted(Schedule(recipe), step))


def test_a_resumed_run_encodes_no_texts_of_stages_that_are_over_and_ends_with_the_same_bits(few, tmp_path, capsys):
    recipe, run = small_overnight(few / "cache", FEW), tmp_path / "run"
    assert train(recipe, run, False, Ranks(), stop=StopAfter(5)) is None
    capsys.readouterr()
    moved = small_overnight(tmp_path / "cache", FEW)
    assert train(moved, run, True, Ranks()) is not None
    left = needed(recipe, 6)
    assert f"0 of the run's {left} are there; {left} are encoded now" in capsys.readouterr().err
    assert left < needed(recipe, 0)
    check_same_run(run, few / "run", sum(FEW))


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_an_earlier_stage_with_the_texts_of_that_stage(few, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(few / "run", run)
    for step in range(4, sum(FEW) + 1):
        path = run / "checkpoints" / f"step-{step:06d}" / "state.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert resumed_step([run / "checkpoints"]) == 3
    assert train(small_overnight(tmp_path / "cache", FEW), run, True, Ranks()) is not None
    assert f"0 of the run's {needed(small_overnight(few / 'cache', FEW), 3)} are there" in capsys.readouterr().err
    check_same_run(run, few / "run", sum(FEW))


def ended(arguments: Sequence[str], folder: Path, there: Callable[[], bool], killed: bool = True) -> None:
    """Start the command, and end its process once something is there."""
    process = start(arguments, folder)
    deadline = time.monotonic() + BOUND_S
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
    process.communicate()


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name[-6:]) for path in (run / "checkpoints").glob("step-??????"))


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
@pytest.mark.parametrize("place", [list, on_accelerator], ids=["cpu", "accelerator"])
def test_a_run_that_is_killed_in_the_cache_in_each_stage_and_between_them_has_the_bits_of_one_in_one_go(place, comfyui_path, tmp_path):
    for name in ("whole", "cut", "cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(small_overnight("cache").to_toml(), encoding="utf-8")

    def arguments(name: str, *more: str) -> list[str]:
        folder = tmp_path / name
        return command(comfyui_path, folder / "base", folder / "run", *more, settings=(), recipe=str(folder / "recipe.toml"))

    whole, cut, run = tmp_path / "whole", tmp_path / "cut", tmp_path / "cut" / "run"
    finish(place(arguments("whole")), whole)
    ended(place(arguments("cut")), cut, lambda: any(cut.glob("cache/*/*.safetensors")))
    assert not steps_in(run)
    # At its first start again, without a checkpoint; then in a stage, at its end, and so on, once by a signal that saves.
    places = (5, BOUNDARIES[0], BOUNDARIES[0] + 3, BOUNDARIES[1], BOUNDARIES[1] + 2)
    for step in places:
        more = ["--resume"] if steps_in(run) else []
        ended(place(arguments("cut", *more)), cut, lambda step=step: max(steps_in(run), default=0) >= step, killed=step != places[2])
        # As if it had been killed there.
        for later in (one for one in steps_in(run) if one > step and step in BOUNDARIES):
            shutil.rmtree(run / "checkpoints" / f"step-{later:06d}")
    said = finish(place(arguments("cut", "--resume")), cut)
    assert "the teacher is not loaded" in said
    check_same_run(run, whole / "run", sum(STEPS))
    if place is on_accelerator:
        assert "on npu:0" in (run / "train.log").read_text(encoding="utf-8")
        finish(arguments("cpu"), tmp_path / "cpu")
        npu, cpu = ([row["loss"] for row in metrics(tmp_path / name / "run") if "loss" in row] for name in ("whole", "cpu"))
        # Dropout draws other numbers there.
        assert npu == pytest.approx(cpu, rel=0.5)
