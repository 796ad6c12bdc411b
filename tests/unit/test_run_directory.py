"""A run's folder belongs to one run and one process; a run stops by a signal when asked, and at once when asked twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distilled_t5.runtime.lock import RunError
from distilled_t5.runtime.stop import SAME_REQUEST_S, StopRequest
from distilled_t5.train.run_directory import RunDirectory

BOOTSTRAP = f"import runpy; runpy.run_path({str(Path(__file__).resolve().parent.parent / 'conftest.py')!r})\n"
RECIPE = 'name = "a run"\n'


def test_a_new_run_lays_out_its_folder(tmp_path):
    with RunDirectory(tmp_path / "runs" / "first").start(RECIPE) as run:
        assert run.recipe.read_text() == RECIPE
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", "checkpoints", "recipe.toml", "samples"]
        assert run.is_run
        assert not run.has_checkpoints


def test_two_cannot_write_to_one_run_and_the_second_learns_who_does(tmp_path):
    with RunDirectory(tmp_path).start(RECIPE):
        for again in (lambda: RunDirectory(tmp_path).resume(), lambda: RunDirectory(tmp_path).start(RECIPE)):
            with pytest.raises(RunError, match=rf"Another process writes to the run in .*process {os.getpid()} on .*\nWhat to do: wait"):
                again()
    RunDirectory(tmp_path).resume().close()


def test_a_run_that_saved_nothing_is_started_over(tmp_path):
    with RunDirectory(tmp_path).start(RECIPE) as run:
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "step-000100.broken").mkdir()
    with RunDirectory(tmp_path).start('name = "another"\n') as run:
        assert run.recipe.read_text() == 'name = "another"\n'
        assert not run.metrics.exists()
        assert (run.checkpoints / "step-000100.broken").is_dir()


@pytest.mark.parametrize("name", ["step-000100", "step-000100.replaced"])
def test_a_run_with_checkpoints_is_not_started_over(tmp_path, name):
    with RunDirectory(tmp_path).start(RECIPE) as run:
        (run.checkpoints / name).mkdir()
    with pytest.raises(RunError, match=r"holds a run with checkpoints.\nWhat to do: continue with --resume"):
        RunDirectory(tmp_path).start("other")
    assert (tmp_path / "recipe.toml").read_text() == RECIPE
    RunDirectory(tmp_path).resume().close()


def test_prompts_are_written_under_the_lock_and_never_over_a_users_own(tmp_path):
    own, run = tmp_path / "own", tmp_path / "run"
    own.mkdir()
    (own / "prompts.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files but no run"):
        RunDirectory(own).start(RECIPE, "a red heart\n")
    assert (own / "prompts.txt").read_text() == "mine"
    with RunDirectory(run).start(RECIPE, "a red heart\n"):
        with pytest.raises(RunError, match=r"Another process writes(.|\n)*in ComfyUI: give another name"):
            RunDirectory(run).start(RECIPE, "a blue ring\n")
        assert (run / "prompts.txt").read_text() == "a red heart\n"
    RunDirectory(run).start(RECIPE, "a blue ring\n").close()
    assert (run / "prompts.txt").read_text() == "a blue ring\n"


def test_a_run_is_refused_in_a_folder_with_other_files_and_in_place_of_a_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files but no run"):
        RunDirectory(tmp_path).start(RECIPE)
    with pytest.raises(RunError, match="is a file"):
        RunDirectory(tmp_path / "notes.txt").start(RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_a_missing_run_is_refused_and_creates_nothing(tmp_path):
    with pytest.raises(RunError, match=r"There is no run in .*\nWhat to do: start it without --resume"):
        RunDirectory(tmp_path / "typo").resume()
    assert not (tmp_path / "typo").exists()


def test_an_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written to: .+\nWhat to do"):
        RunDirectory(tmp_path / "file" / "run").start(RECIPE)


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX")
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", ".lock", "checkpoints", "samples"])
def test_a_pipe_in_the_place_of_a_file_is_an_error_that_names_it_and_does_not_wait(tmp_path, name):
    RunDirectory(tmp_path).start(RECIPE).close()
    path = tmp_path / name
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(OSError, match=rf"cannot be written to: .*{name}'\.\nWhat to do"):
        RunDirectory(tmp_path).resume()


@pytest.mark.skipif(os.name != "posix", reason="named pipes are POSIX")
def test_a_pipe_in_the_place_of_the_recipe_is_not_a_run(tmp_path):
    os.mkfifo(tmp_path / "recipe.toml")
    with pytest.raises(RunError, match=r"There is no run in"):
        RunDirectory(tmp_path).resume()
    with pytest.raises(RunError, match=r"holds files but no run"):
        RunDirectory(tmp_path).start(RECIPE)


def test_differences_of_the_recipe_are_listed_and_equal_ones_pass(tmp_path):
    run = RunDirectory(tmp_path)
    run.refuse_other_recipe([])
    with pytest.raises(RunError) as refusal:
        run.refuse_other_recipe(["seed: 1 -> 2", "optimizer.learning_rate: 0.0001 -> 0.0002"])
    lines = str(refusal.value).splitlines()
    assert lines[1:3] == ["  seed: 1 -> 2", "  optimizer.learning_rate: 0.0001 -> 0.0002"]
    assert lines[3].startswith("What to do: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name == "posix" else [])])
def test_first_signal_is_a_request_and_the_handlers_come_back(number, capfd):
    of_these_tests = signal.signal(number, signal.default_int_handler)  # they may run under nohup
    try:
        with StopRequest() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            signal.raise_signal(number)  # as `timeout` does: to the process and to its group
            assert stop.requested
            assert stop.signal_name == number.name
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, of_these_tests)
    assert capfd.readouterr().err.count("the run is saved after this step") == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGHUP")
def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


WAITING = """
import time
from distilled_t5.runtime.stop import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(100)
"""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between processes")
def test_second_signal_ends_the_process_at_once():
    with subprocess.Popen([sys.executable, "-c", BOOTSTRAP + WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == "asked\n"
        time.sleep(2 * SAME_REQUEST_S)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == -signal.SIGTERM
