"""Stopping by Ctrl-C, `kill` or a closed terminal: the first signal is a request, the second one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; not on Windows
# `timeout`, terminals and job managers signal both a process and its group: two such signals are one request.
SAME_REQUEST_S = 0.5
NOTICE = "\nStopping: the run is saved after this step, or the texts that are encoded. A second signal ends it at once, without saving.\n"


class Stopped(Exception):
    """A request to stop was followed before the first step of a run."""


class StopRequest:
    """While open, the first SIGINT, SIGTERM or SIGHUP sets `signal_name`, which the loop checks; a later one ends the process at once.

    Under nohup, SIGHUP stays ignored. torchrun passes a signal to every rank once and kills those that are still
    alive 30 s later: a save that takes longer is lost, the checkpoint before it is not. Signals can be caught in the main thread only:
    elsewhere entering raises ValueError.
    """

    def __init__(self, notice: str = NOTICE) -> None:
        self.notice = notice
        self.signal_name: str | None = None
        self._asked_at_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the loop should save and stop."""
        return self.signal_name is not None

    def __enter__(self) -> StopRequest:
        hangup = [HANGUP] if HANGUP and signal.getsignal(HANGUP) != signal.SIG_IGN else []
        self._before = {number: signal.signal(number, self._on_signal) for number in (*SIGNALS, *hangup)}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._asked_at_s = signal.Signals(number).name, time.monotonic()
            # Not print: a handler may interrupt one, which must not be entered twice.
            with contextlib.suppress(OSError):
                os.write(2, self.notice.encode())
        elif number != HANGUP and time.monotonic() - self._asked_at_s > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
