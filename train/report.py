"""What a run tells: progress bar, metrics.jsonl, train.log, TensorBoard where it is installed, pictures."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil
import torch
from tqdm import tqdm

from ..runtime.disk import replace_file
from ..runtime.logs import FILE_INTERVAL_S, TERMINAL_INTERVAL_S, logging_to
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.tensorboard.writer import SummaryWriter

MB = 1_000_000
JPEG_QUALITY = 92
NO_TENSORBOARD = "TensorBoard is not installed; `pip install tensorboard` adds its curves. metrics.jsonl has the same numbers."
log = logging.getLogger(__name__)


class Reporter:
    """Reports one run from `start_step` on; on processes other than the main one, where `run` is None, it does nothing.

    Metrics beyond `start_step` are cut off first, so that after a resume no step stands there twice.
    """

    def __init__(self, run: RunDirectory | None, is_main: bool, total_steps: int, start_step: int = 0) -> None:
        assert (run is not None) == is_main, "the main process, and no other, has the run directory"
        self.run = run
        self.step_number = start_step
        self.preview_troubles = 0
        self._closing = contextlib.ExitStack()
        self._clock_s = time.monotonic()
        self._bar: tqdm[Any] | None = None
        self._metrics: BinaryIO | None = None
        self._board: SummaryWriter | None = None
        if run is not None:
            with contextlib.ExitStack() as opened:
                self._open(run, total_steps, opened)
                self._closing = opened.pop_all()

    def step(self, step: int, loss: float, samples: int, **numbers: float) -> None:
        """Report an optimizer step: the loss over the global batch of `samples`, and whatever else was measured, by name."""
        now_s = time.monotonic()
        samples_per_s = samples / max(now_s - self._clock_s, 1e-9)
        self.step_number, self._clock_s = step, now_s
        if self._bar is None:
            return
        memory = memory_mb()
        self._write({"loss": loss, **numbers, "samples_per_s": round(samples_per_s, 3), **memory}, "train")
        (memory_name, memory_value), *_ = memory.items()
        shown = {"loss": f"{loss:.4g}", "samples/s": f"{samples_per_s:.3g}", memory_name: f"{memory_value:,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def held_out(self, loss_by_band: Mapping[str, float], samples: int) -> float:
        """Report the held-out loss of each sigma band, measured on `samples` prompts; returns the mean of the bands."""
        mean = statistics.fmean(loss_by_band.values())
        if self.run is not None:
            self._write({"held_out_loss": mean, "held_out_samples": samples, "held_out_by_band": dict(loss_by_band)}, "validation")
            log.info("Step %d: held-out loss %.6g on %d prompts.", self.step_number, mean, samples)
        self._clock_s = time.monotonic()
        return mean

    def picture(self, name: str, make: Callable[[], Image.Image]) -> Path | None:
        """Call `make` and write its picture to samples/; returns the file, or None if that failed.

        A run is worth more than a preview: trouble of any kind is logged with its traceback, counted, and the run goes on.
        """
        if self.run is None:
            return None
        path = self.run.samples / f"step-{self.step_number:06d}-{name}.jpg"
        try:
            encoded = io.BytesIO()
            make().convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
            replace_file(path, encoded.getvalue())
        except Exception:
            self.preview_troubles += 1
            log.exception("Step %d: the picture %s could not be made; the run goes on.", self.step_number, name)
            path = None
        self._clock_s = time.monotonic()
        return path

    def saved(self, path: Path) -> None:
        """Report a saved checkpoint."""
        if self.run is not None:
            log.info("Step %d: saved %s.", self.step_number, path.name)
        self._clock_s = time.monotonic()

    def close(self) -> None:
        """Close everything and take the log handlers off again."""
        if self.preview_troubles:
            log.warning("%d pictures could not be made; train.log says why.", self.preview_troubles)
        self._closing.close()
        self._bar = self._metrics = self._board = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()
        if error is not None and self.run is not None:
            # The terminal of a long run may be gone by the time that somebody asks; a full disk is no further trouble.
            with contextlib.suppress(OSError), self.run.log.open("a", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))

    def _open(self, run: RunDirectory, total_steps: int, opened: contextlib.ExitStack) -> None:
        opened.enter_context(logging_to(run.log))
        dropped = cut_metrics(run.metrics, self.step_number)
        if dropped:
            log.info("Removed %d lines of metrics beyond step %d, which are measured again.", dropped, self.step_number)
        self._metrics = opened.enter_context(run.metrics.open("ab", buffering=0))
        if importlib.util.find_spec("tensorboard") is None:
            log.info(NO_TENSORBOARD)
        else:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=self.step_number + 1)
            opened.callback(self._board.close)
        interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else FILE_INTERVAL_S
        self._bar = tqdm(total=total_steps, initial=self.step_number, unit="step", mininterval=interval_s, dynamic_ncols=True)
        opened.callback(self._bar.close)

    def _write(self, values: Mapping[str, Any], kind: str) -> None:
        assert self._metrics is not None, "the report is closed"
        line = json.dumps({"step": self.step_number, **_finite(values)}, allow_nan=False) + "\n"
        try:
            self._metrics.write(line.encode())
        except OSError as error:
            raise OSError(
                f"{self._metrics.name} cannot be written to: {error.strerror}.\n"
                "What to do: see that the disk has room, then go on with --resume."
            ) from error
        if self._board is not None:
            for name, value in _flat(values):
                self._board.add_scalar(f"{kind}/{name}", value, self.step_number)


def cut_metrics(path: Path, last_step: int) -> int:
    """Remove the lines of steps beyond `last_step`, and what a kill left of a line; returns how many lines went."""
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= last_step]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def memory_mb() -> dict[str, float]:
    """By name: the most memory that tensors took on the GPU since `reset_peak_memory`, if there is one, and the process's RAM now."""
    ram = {"ram_mb": round(psutil.Process().memory_info().rss / MB, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"gpu_peak_mb": round(torch.cuda.max_memory_allocated() / MB, 1)} | ram
    return ram


def reset_peak_memory() -> None:
    """Forget what the GPU's tensors took so far."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _step_of(line: bytes) -> int | None:
    """The step of a complete line of metrics."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return values.get("step") if isinstance(values, dict) else None


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity: null stands for them."""
    return {name: _finite(value) if isinstance(value, Mapping) else _or_null(value) for name, value in values.items()}


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    nested = [(name, part) for name, value in values.items() if isinstance(value, Mapping) for part in value.items()]
    return [(name, value) for name, value in values.items() if not isinstance(value, Mapping)] + [
        (f"{name}/{band}", value) for name, (band, value) in nested
    ]
