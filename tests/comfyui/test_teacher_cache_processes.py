"""A cache of teacher's texts made by processes that are killed, several at once, or in two ranks has the bits of one made in one go."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.tests.support.cache_runs import PARTS, SETTINGS, check_same_run, made, recipe, shards_of, texts_in
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.trainer import PACK, TWO_PROCESSES, command, finish, start
from distilled_t5.train.batches import Schedule
from distilled_t5.train.cache_plan import wanted


def cache_command(comfyui: Path, base: Path, *more: str) -> list[str]:
    sets = [part for setting in (*SETTINGS, "stage.1.steps=400", "teacher.cache=cache", *more) for part in ("--set", setting)]
    return [str(PACK / "train"), "cache", "smoke", "--comfyui", str(comfyui), *sets, "--", "--base-directory", str(base), "--cpu"]


def all_texts(folder: Path) -> dict[str, Any]:
    one = recipe(folder / "cache", "stage.1.steps=400")
    return texts_in(made(one), list(wanted(Schedule(one))))


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_cache_that_was_killed_or_made_by_two_at_once_or_by_two_ranks_has_the_bits_of_one_made_in_one_go(comfyui_path, tmp_path):
    for name in ("whole", "killed", "together", "ranks"):
        (tmp_path / name).mkdir()
    said = finish(cache_command(comfyui_path, tmp_path), tmp_path / "whole")
    assert "Done: " in said and "teacher's texts: 100%" in said
    process = start(cache_command(comfyui_path, tmp_path), tmp_path / "killed")
    deadline = time.monotonic() + 300
    while len(shards_of(tmp_path / "killed" / "cache")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "are there; " in finish(cache_command(comfyui_path, tmp_path), tmp_path / "killed")
    pair = [start(cache_command(comfyui_path, tmp_path), tmp_path / "together") for _ in range(2)]
    for process in pair:
        output = process.communicate()[0]
        assert process.returncode == 0, output
    finish(cache_command(comfyui_path, tmp_path), tmp_path / "ranks", launcher=TWO_PROCESSES)
    expected_texts = all_texts(tmp_path / "whole")
    for name in ("killed", "together", "ranks"):
        assert same(all_texts(tmp_path / name), expected_texts), name
        assert not list((tmp_path / name / "cache").rglob(".*")), name
    # And a run with two processes takes them.
    sets = [*SETTINGS, "teacher.cache=whole/cache"]
    said = finish(command(comfyui_path, tmp_path, tmp_path / "run", settings=sets), tmp_path, launcher=TWO_PROCESSES)
    assert said.count("the teacher is not loaded") == 1


def resumed_until(comfyui: Path, folder: Path, step: int, killed: bool) -> None:
    """Train, or go on, until a step is logged; then end the process."""
    more = ["--resume"] if (folder / "run" / "checkpoints").is_dir() else []
    settings = [*SETTINGS[:-2], "checkpoints.every_steps=1", SETTINGS[-1], "teacher.cache=cache"]
    process = start(command(comfyui, folder / "base", folder / "run", *more, settings=settings), folder)
    deadline = time.monotonic() + 300
    while not any(int(path.name[-6:]) >= step for path in folder.glob("run/checkpoints/step-*")) and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
    process.communicate()


@pytest.mark.full
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_run_with_a_cache_that_is_killed_between_and_in_stages_has_the_bits_of_one_in_one_go(comfyui_path, tmp_path):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    settings = [*SETTINGS[:-2], "checkpoints.every_steps=1", SETTINGS[-1], "teacher.cache=cache"]
    finish(command(comfyui_path, tmp_path / "whole" / "base", tmp_path / "whole" / "run", settings=settings), tmp_path / "whole")
    # The first stage has two steps.
    for step, killed in ((2, True), (5, True), (8, False)):
        resumed_until(comfyui_path, tmp_path / "cut", step, killed)
    # The folder of the texts may be moved meanwhile.
    (tmp_path / "cut" / "cache").rename(tmp_path / "cut" / "moved")
    settings[-1] = "teacher.cache=moved"
    said = finish(
        command(comfyui_path, tmp_path / "cut" / "base", tmp_path / "cut" / "run", "--resume", settings=settings), tmp_path / "cut"
    )
    assert "the teacher is not loaded" in said
    # Python's and numpy's generators, which the trainer does not use, differ from process to process.
    check_same_run(tmp_path / "cut" / "run", tmp_path / "whole" / "run", PARTS)
