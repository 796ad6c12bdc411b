"""The trainer's command as tests start it: whole runs of the smoke recipe in a process of their own, in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from .prepared import run_prepared

if TYPE_CHECKING:
    from distilled_t5.encoder.teacher import Teacher
    from distilled_t5.train.workshop import Workshop

PACK = Path(__file__).resolve().parents[2]
QUICK = [
    "stage.0.steps=2",
    "stage.1.steps=6",
    "sampling.steps=4",
    "sampling.token_lengths=[16]",
    "validation.every_steps=4",
    "validation.prompts=2",
    "checkpoints.every_steps=4",
    "checkpoints.keep_last=9",
    "teacher.chunk_prompts=8",
    "student.dropout=0.1",
]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
BOUND_S = 400
ACCELERATOR = Path(__file__).with_name("practice_accelerator_command.py")
STARTED: list[subprocess.Popen[str]] = []


def command(comfyui: Path, base: Path, run: Path, *extra: str, settings: Sequence[str] = QUICK, recipe: str = "smoke") -> list[str]:
    """The Python arguments that train a recipe into `run` on the CPU, with ComfyUI's models in `base`."""
    sets = [part for setting in settings for part in ("--set", setting)]
    ours = [str(PACK / "train"), recipe, "--run", str(run), "--comfyui", str(comfyui), *sets, *extra]
    return [*ours, "--", "--base-directory", str(base), "--cpu"]


def finish(
    arguments: Sequence[str],
    folder: Path,
    code: int = 0,
    launcher: Sequence[str] = (),
    before: Callable[[], object] | None = None,
) -> str:
    """Run the command in `folder` to its end, after `before` in the new process; what it printed. The exit status must be `code`.

    With neither `launcher` nor `before`, the process is forked from one that has imported torch already.
    """
    if os.name == "posix" and not launcher and before is None:
        status, said = run_prepared(arguments, folder, BOUND_S)
        assert status == code, said
        return said
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        preexec_fn=before,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(arguments: Sequence[str], folder: Path, launcher: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, which ends with the test at the latest; what it prints is in `stdout`."""
    command, env = [sys.executable, *launcher, *arguments], {**os.environ, **environment}
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    STARTED.append(process)
    return process


def interrupt(process: subprocess.Popen[str]) -> None:
    """Press Ctrl-C in a development command, which must say that it continues, and leave no child."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=BOUND_S)[0]
    assert process.returncode == 130, said
    assert "Stopped. The same command continues." in said
    assert "Traceback" not in said
    assert psutil.wait_procs(children, timeout=10)[1] == []


def kill_started() -> None:
    """Kill what a failed test has left running."""
    while STARTED:
        STARTED.pop().kill()


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Come back when the run has reported an optimizer step; fails if the process ends before."""
    deadline = time.monotonic() + BOUND_S
    while not has_step(run, step):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def has_step(run: Path, step: int) -> bool:
    """Whether the run has reported an optimizer step."""
    path = run / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text(encoding="utf-8")


def teacher_of(workshop: Workshop) -> Teacher:
    """The teacher of a run without a cache."""
    from distilled_t5.encoder.teacher import Teacher

    assert isinstance(workshop.teacher, Teacher)
    return workshop.teacher


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def on_accelerator(arguments: Sequence[str]) -> list[str]:
    """A command with the practice accelerator in the place of the CPU."""
    return [str(ACCELERATOR), *(part for part in arguments if part != "--cpu")]
