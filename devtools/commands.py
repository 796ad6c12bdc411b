"""Runs commands of the pack in processes of their own, several at the same time."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Time to save before a process is killed.
PATIENCE_S = 60
POLL_S = 0.2
Process = subprocess.Popen[bytes]


def run_all(commands: Iterable[Sequence[str | Path]], at_once: int = 1) -> None:
    """Run Python with each of these arguments, `at_once` at the same time, each on one thread. The next is asked for when it can start.

    Raises RuntimeError if one fails. Then, and on Ctrl-C, the others are asked to save and end.
    """
    waiting, running = iter(commands), list[Process]()
    try:
        while True:
            for command in itertools.islice(waiting, at_once - len(running)):
                started = [sys.executable, *map(str, command)]
                running.append(subprocess.Popen(started, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}))
            if not running:
                return
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                check(process)
            time.sleep(POLL_S)
    finally:
        stop(running)


def check(process: Process) -> None:
    """Raise RuntimeError if a process that has ended failed."""
    if process.returncode:
        command = " ".join(map(str, process.args[1:3])) if isinstance(process.args, list) else process.args
        raise RuntimeError(
            f"{command} ended with status {process.returncode}.\nWhat to do: see its output above; the same command continues."
        )


def stop(processes: Sequence[Process]) -> None:
    """Ask processes to save and end, as Ctrl-C does, and wait; kill those that do not end."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
    for process in processes:
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
