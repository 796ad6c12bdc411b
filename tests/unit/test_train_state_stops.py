"""A complete checkpoint exists after a full disk, and after a kill at any moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Scripts of this file see the pack as the tests do.
BOOTSTRAP = f"""
import json, runpy, sys
runpy.run_path({str(Path(__file__).resolve().parent.parent / "conftest.py")!r})
from distilled_t5.encoder.files import write_student
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.states import some_state, write_plain
from distilled_t5.tests.support.tiny_students import tiny_tensors
from distilled_t5.train.state import Checkpoints
"""
posix = pytest.mark.skipif(os.name != "posix", reason="kill -9, fork and file size limits are POSIX")


def run_script(code: str, *arguments: object) -> list[Any]:
    """What a script prints as JSON, one value per line; it sees the pack as tests do."""
    done = subprocess.run(
        [sys.executable, "-c", BOOTSTRAP + code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# A limit on the size of a file is what a full disk looks like to one process. Each case lets the files written before one pass.
FULL_DISK = """
import resource, torch
from pathlib import Path
big, small = tiny_tensors(dtype=torch.float32), {"weight": torch.zeros(1)}
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for name, writer, student in [
    ("student.safetensors", write_student, big),
    ("student.safetensors", write_plain, big),
    ("state.safetensors", write_plain, small),
    ("state.json", write_plain, small),
]:
    store = Checkpoints(Path(sys.argv[1]), writer, 1)
    state = some_state(1)
    state.student, state.position = student, {"text": "x" * 100_000}
    first = store.save(state)
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[name]) - 1, hard))
    state.step = 2
    try:
        store.save(state)
        error = None
    except OSError as caught:
        error = [type(caught).__name__, str(caught)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    untouched = before == {path.name: path.read_bytes() for path in first.iterdir()}
    print(json.dumps([name, error, [path.name for path in store.folder.iterdir()], untouched, store.load_latest()[0].step]))
"""


@posix
def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint_alone(tmp_path):
    results = run_script(FULL_DISK, tmp_path)
    assert [name for name, *_ in results] == ["student.safetensors", "student.safetensors", "state.safetensors", "state.json"]
    for _name, error, left, untouched, step in results:
        assert error is not None
        assert error[0] == "CheckpointNotSaved"
        assert "The checkpoint of step 2 could not be saved" in error[1] and "File too large" in error[1]
        assert error[1].count("What to do: check the disk") == 1
        assert (left, untouched, step) == (["step-000001"], True, 1)


# The parent has imported torch once; each child is killed at a moment of its own, mostly in the middle of a save.
KILLS = """
import os, random, select, signal, time
from pathlib import Path
from distilled_t5.train.run_directory import RunDirectory, RunError
run_path = Path(sys.argv[1])
RunDirectory(run_path).start('name = "x"').close()

def write_slowly(path, tensors):
    write_plain(path, tensors)
    time.sleep(0.01)  # on a fast disk, a kill would seldom come in the middle of a save

def child(saved_to):
    with RunDirectory(run_path).resume() as run:
        store = Checkpoints(run.checkpoints, write_slowly, 2)
        step = store.load_latest()[0].step if run.has_checkpoints else 0
        while True:
            step += 1
            store.save(some_state(step, best=1 / step if step < 5 else 0.25))
            os.write(saved_to, b".")

chance = random.Random()
for _ in range(30):
    saved_from, saved_to = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(saved_to)
    os.close(saved_to)
    os.read(saved_from, 1)
    refused = False
    try:
        RunDirectory(run_path).resume().close()
    except RunError:
        refused = True
    time.sleep(chance.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    saves = 1 + len(os.read(saved_from, 100000))
    os.close(saved_from)
    # The next run removes them as it starts.
    unfinished = [path.name for path in (run_path / "checkpoints").iterdir() if path.name.startswith(".")]
    with RunDirectory(run_path).resume() as run:
        store = Checkpoints(run.checkpoints, write_plain, 2)
        state, notes = store.load_latest()
        expected = vars(some_state(state.step, state.best)) | {"rng": state.rng}
        good = same(vars(state), expected)
        left = [path.name for path in run.checkpoints.iterdir()]
        print(json.dumps([state.step, notes, good, refused, saves, unfinished, sorted(left)]))
"""


@posix
@pytest.mark.full
def test_after_a_kill_at_any_moment_there_is_a_complete_checkpoint_and_the_lock_is_free(tmp_path):
    results = run_script(KILLS, tmp_path / "run")
    assert len(results) == 30
    done = 0
    for step, notes, good, refused, saves, _unfinished, left in results:
        assert good
        assert refused, "while a process writes to the run, another one is refused"
        assert notes == []
        # What was reported as saved is there; one more may have been whole when the kill came.
        assert step - done in (saves, saves + 1)
        assert all(name.startswith("step-") and len(name) == 11 for name in left)
        done = step
    assert any(unfinished for *_, unfinished, _left in results), "no kill came in the middle of a save"
    assert "step-000004" in results[-1][-1], "the best one was removed"
