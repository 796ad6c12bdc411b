"""Reports of a run: progress bar, metrics.jsonl, train.log, TensorBoard where it is installed, images."""

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
NO_TENSORBOARD = "TensorBoard is not installed; `pip install tensorboard` adds curves. metrics.jsonl has the same numbers."
NO_HELD_OUT_LOSS = (
    "Step %d: the held-out loss on %d prompts is not a finite number at the noise levels %s, so this step cannot be the best one. "
    "What to do: nothing if it happens once; if it continues, stop the run and check teacher.t5, diffusion_model.file and its dtype."
)
log = logging.getLogger(__name__)


class Reporter:
    """Reports one run from `start_step` on; on processes other than the main one, where `run` is None, it does nothing.

    Metrics beyond `start_step` are removed first, so that after a resume no step is listed twice.
    """

    def __init__(self, run: RunDirectory | None, is_main: bool, total_steps: int, start_step: int = 0) -> None:
        assert (run is not None) == is_main, "only the main process has the run directory"
        self.run = run
        self.step_number = start_step
        self.failed_images = 0
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
        """Report an optimizer step: the loss over the global batch of `samples`, and other measured numbers by name."""
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
            if math.isfinite(mean):
                log.info("Step %d: held-out loss %.6g on %d prompts.", self.step_number, mean, samples)
            else:
                bands = ", ".join(band for band, loss in loss_by_band.items() if not math.isfinite(loss))
                log.warning(NO_HELD_OUT_LOSS, self.step_number, samples, bands)
        self._clock_s = time.monotonic()
        return mean

    def image(self, name: str, make: Callable[[], Image.Image]) -> Path | None:
        """Call `make` and write its image to samples/; returns the file, or None if that failed.

        A failure of any kind is logged with its traceback and counted, and the run continues.
        """
        if self.run is None:
            return None
        path = self.run.samples / f"step-{self.step_number:06d}-{name}.jpg"
        try:
            encoded = io.BytesIO()
            make().convert("RGB").save(encoded, "JPEG", quality=JPEG_QUALITY)
            replace_file(path, encoded.getvalue())
        except Exception:
            self.failed_images += 1
            log.exception("Step %d: the image %s could not be made; the run continues.", self.step_number, name)
            path = None
        self._clock_s = time.monotonic()
        return path

    def saved(self, path: Path) -> None:
        """Report a saved checkpoint."""
        if self.run is not None:
            log.info("Step %d: saved %s.", self.step_number, path.name)
        self._clock_s = time.monotonic()

    def close(self) -> None:
        """Close everything and remove the log handlers."""
        if self.failed_images:
            log.warning("%d images could not be made; the reasons are in train.log.", self.failed_images)
        self._closing.close()
        self._bar = self._metrics = self._board = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()
        if error is not None and self.run is not None:
            # The terminal may be closed by the time that the reason is wanted. A full disk must not hide the error.
            with contextlib.suppress(OSError), self.run.log.open("a", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))

    def _open(self, run: RunDirectory, total_steps: int, opened: contextlib.ExitStack) -> None:
        opened.enter_context(logging_to(run.log))
        dropped = cut_metrics(run.metrics, self.step_number)
        if dropped:
            log.info("Removed %d lines of metrics beyond step %d; those steps are repeated.", dropped, self.step_number)
        self._metrics = opened.enter_context(run.metrics.open("ab", buffering=0))
        if importlib.util.find_spec("tensorboard") is None:
            log.info(NO_TENSORBOARD)
        else:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=self.step_number + 1)
            opened.callback(self._close_board)
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
                f"{self._metrics.name} cannot be written: {error.strerror}.\n"
                "What to do: check that the disk has free space, then resume with --resume."
            ) from error
        if self._board is not None:
            try:
                for name, value in _flat(values):
                    self._board.add_scalar(f"{kind}/{name}", value, self.step_number)
            except OSError as error:
                log.warning("The curves for TensorBoard cannot be written (%s); the run continues without them.", error)
                self._board = None

    def _close_board(self) -> None:
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def cut_metrics(path: Path, last_step: int) -> int:
    """Remove the lines of steps beyond `last_step` and incomplete lines; returns how many were removed."""
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= last_step]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def memory_mb() -> dict[str, float]:
    """By name: the peak of memory taken by tensors on the GPU since `reset_peak_memory`, if there is a GPU, and the process's RAM now."""
    ram = {"ram_mb": round(psutil.Process().memory_info().rss / MB, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"gpu_peak_mb": round(torch.cuda.max_memory_allocated() / MB, 1)} | ram
    return ram


def reset_peak_memory() -> None:
    """Restart the measurement of peak GPU memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _step_of(line: bytes) -> int | None:
    """The step of a complete line of metrics."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if type(step) is int else None


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for NaN and infinity, which JSON does not have."""
    return {name: _finite(value) if isinstance(value, Mapping) else _or_null(value) for name, value in values.items()}


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _flat(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    nested = [(name, part) for name, value in values.items() if isinstance(value, Mapping) for part in value.items()]
    return [(name, value) for name, value in values.items() if not isinstance(value, Mapping)] + [
        (f"{name}/{band}", value) for name, (band, value) in nested
    ]
