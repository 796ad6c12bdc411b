"""Logging of this package: to a file, and above the progress bar."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

TERMINAL_INTERVAL_S, FILE_INTERVAL_S = 0.2, 30.0
# Every module of this package logs below this name.
LOGGER = __name__.rpartition(".runtime.")[0] or __name__


@contextlib.contextmanager
def logging_to(path: Path, shown: bool = True) -> Iterator[None]:
    """While open, this package logs to the file and, if `shown`, above the progress bar; ComfyUI also logs to the file."""
    to_file = _LogFile(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    above_bar = _AboveBar()
    ours, root = logging.getLogger(LOGGER), logging.getLogger()
    before = ours.level, ours.propagate
    # Not propagated: ComfyUI's handlers would print every line again, across the bar.
    ours.propagate = False
    ours.setLevel(logging.INFO)
    if shown:
        ours.addHandler(above_bar)
    for logger in (ours, root):
        logger.addHandler(to_file)
    try:
        yield
    finally:
        for logger in (ours, root):
            logger.removeHandler(to_file)
        ours.removeHandler(above_bar)
        ours.level, ours.propagate = before
        to_file.close()


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: what cannot be written is dropped after one notice, and the run continues."""

    _noticed = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._noticed:
            self._noticed = True
            tqdm.write(f"{self.baseFilename} cannot be written ({error}); the run continues without it.", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _AboveBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
