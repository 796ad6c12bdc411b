"""Commands of the pack that a longer command starts and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The time that a command has to save before it is killed.
PATIENCE_S = 60
_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


def call(*arguments: str | Path, **extra: str) -> None:
    """Run a command of the pack to its end and show its output. Raises RuntimeError if its exit status is not 0."""
    command = [sys.executable, *map(str, arguments)]
    with _lock:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **extra})
        _running.add(process)
    try:
        code = process.wait()
    finally:
        if process.poll() is not None:
            _running.discard(process)
    if code:
        raise RuntimeError(f"{' '.join(command[1:3])} ended with status {code}.\nWhat to do: read its output; the same command continues.")


def stop_children() -> None:
    """Interrupt every running command, so that it saves and ends, and wait; kill those that do not end."""
    with _lock:
        left = [process for process in _running if process.poll() is None]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
    for process in left:
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        _running.discard(process)
