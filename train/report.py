"""Reports of a run: progress bar, metrics.jsonl, train.log, page.html, boards such as TensorBoard, images."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil
from tqdm import tqdm

from ..runtime.accelerator import counting_module
from ..runtime.disk import replace_file
from ..runtime.logs import FILE_INTERVAL_S, TERMINAL_INTERVAL_S, logging_to
from .boards import Board, Boards, open_boards
from .curves import ONE_BAND, row_of
from .page import RunPage
from .recipe import Recipe
from .run_directory import CONTINUE, RunDirectory
from .time_left import TimeLeft

if TYPE_CHECKING:
    from PIL import Image

MB = 1_000_000
JPEG_QUALITY = 92
NO_HELD_OUT_LOSS = (
    "%s: the held-out loss on %d prompts is not a finite number%s, so this step cannot be the best one. "
    "What to do: nothing if it happens once; if it continues, stop the run and check teacher.t5, diffusion_model.file and its dtype."
)
log = logging.getLogger(__name__)


class Bar(tqdm):
    """A progress bar whose time left is not the mean of all steps: `left_s`, from what each stage costs."""

    left_s: float | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """What `bar_format` may name."""
        return {**super().format_dict, "left": "?" if self.left_s is None else self.format_interval(self.left_s)}


BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{left}{postfix}]"


class Reporter:
    """Reports one run from `start_step` on; on processes other than the main one, where `run` is None, it does nothing.

    Metrics beyond `start_step` are removed first, so that after a resume no step is listed twice. `boards` get the same numbers and
    images as TensorBoard. `student`: its name, if this is one of several, beside the report of the run: without bar and banner.
    """

    def __init__(
        self, run: RunDirectory | None, recipe: Recipe, start_step: int = 0, boards: Sequence[Board] = (), student: str = ""
    ) -> None:
        self.run, self.recipe, self.student = run, recipe, student
        self.step_number = start_step
        self.failed_images = 0
        self.time_left = TimeLeft.of(recipe)
        self._closing = contextlib.ExitStack()
        self._clock_s = time.monotonic()
        self._bar: Bar | None = None
        self._metrics: BinaryIO | None = None
        self._boards = Boards([])
        self._page: RunPage | None = None
        if run is not None:
            with contextlib.ExitStack() as opened:
                self._open(run, opened, boards)
                self._closing = opened.pop_all()

    def begin(self, facts: Mapping[str, str], in_trial: Mapping[int, float]) -> None:
        """Report what is trained, line by line, and the seconds that a step of later stages took in a trial."""
        self.time_left.in_trial.update(in_trial)
        if self._page is not None:
            self._page.facts = dict(facts)
            self._write_page()
            if not self.student:
                for name, fact in facts.items():
                    log.info("%-16s %s", name, fact)
                self._open_bar()
        self._clock_s = time.monotonic()

    def step(self, step: int, loss: float, samples: int, stage: int = 0, **numbers: float) -> None:
        """Report an optimizer step: the loss over the global batch of `samples`, and other measured numbers by name."""
        seconds = self._lap()
        self.step_number = step
        self.time_left.step(stage, seconds)
        if self.run is None:
            return
        memory = memory_mb()
        samples_per_s = round(samples / max(seconds, 1e-9), 3)
        self._write({"loss": loss, **numbers, "stage": stage, "samples_per_s": samples_per_s, **memory}, "train")
        (memory_name, memory_value), *_ = memory.items()
        if self._bar is not None and self._page is not None:
            shown = {"loss": f"{loss:.4g}", "prompts/s": f"{self._page.curves.prompts_per_s:.3g}", memory_name: f"{memory_value:,.0f}"}
            self._bar.set_description_str(self._stage_name(stage), refresh=False)
            self._bar.set_postfix(shown, refresh=False)
            self._bar.left_s = self.time_left.seconds(step)
            self._bar.update(step - self._bar.n)
        self._write_page(only_if_due=True)

    def held_out(self, loss_by_band: Mapping[str, float], samples: int) -> float:
        """Report the held-out loss of each sigma band, measured on `samples` prompts; returns the mean of the bands."""
        mean = statistics.fmean(loss_by_band.values())
        self.time_left.event("validation", self._lap())
        if self.run is not None:
            self._write({"held_out_loss": mean, "held_out_samples": samples, "held_out_by_band": dict(loss_by_band)}, "validation")
            if math.isfinite(mean):
                log.info("%s: held-out loss %.6g on %d prompts.", self._when, mean, samples)
            else:
                lost = [band for band, loss in loss_by_band.items() if not math.isfinite(loss)]
                log.warning(NO_HELD_OUT_LOSS, self._when, samples, _where(lost))
        return mean

    def image(self, name: str, make: Callable[[], Image.Image]) -> Path | None:
        """Call `make` and write its image to samples/; returns the file, or None if that failed.

        A failure of any kind is logged with its traceback and counted, and the run continues.
        """
        if self.run is None:
            return None
        path = self.run.samples / f"step-{self.step_number:06d}-{name}.jpg"
        try:
            encoded, picture = io.BytesIO(), make().convert("RGB")
            picture.save(encoded, "JPEG", quality=JPEG_QUALITY)
            replace_file(path, encoded.getvalue())
        except Exception:
            self.failed_images += 1
            log.exception("Step %d: the image %s could not be made; the run continues.", self.step_number, name)
            path = None
        else:
            self._boards.image(self.step_number, name, picture)
        self.time_left.event("preview", self._lap())
        self._write_page()
        return path

    def saved(self, path: Path) -> None:
        """Report a saved checkpoint."""
        if self.run is not None and not self.student:
            log.info("Step %d: saved %s.", self.step_number, path.name)
        self.time_left.event("checkpoint", self._lap())

    def close(self, failure: BaseException | None = None) -> None:
        """Close everything, say on the page how the run ended, and remove the log handlers."""
        if self.failed_images:
            log.warning("%d images could not be made; the reasons are in train.log.", self.failed_images)
        if self._page is not None:
            self._page.state = "failed" if failure else "finished" if self.step_number >= sum(self.time_left.stages) else "stopped"
            self._page.failure = "" if failure is None else str(failure)
            self._write_page()
        self._closing.close()
        self._bar = self._metrics = self._page = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close(error)
        if error is not None and self.run is not None:
            # The terminal may be closed by the time that the reason is wanted. A full disk must not hide the error.
            with contextlib.suppress(OSError), self.run.log.open("a", encoding="utf-8") as file:
                file.writelines(traceback.format_exception(error))

    def _open(self, run: RunDirectory, opened: contextlib.ExitStack, boards: Sequence[Board]) -> None:
        opened.enter_context(logging_to(run.log, shown=not self.student))
        dropped = cut_metrics(run.metrics, self.step_number)
        if dropped and not self.student:
            log.info("Removed %d lines of metrics beyond step %d; those steps are repeated.", dropped, self.step_number)
        self._metrics = opened.enter_context(run.metrics.open("ab", buffering=0))
        self._page = RunPage(run, self.recipe)
        self._boards = Boards([*open_boards(run, self.recipe, self.step_number, quiet=bool(self.student)), *boards])
        opened.callback(self._boards.close)

    def _open_bar(self) -> None:
        interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else FILE_INTERVAL_S
        self._bar = Bar(
            total=sum(self.time_left.stages),
            initial=self.step_number,
            mininterval=interval_s,
            dynamic_ncols=True,
            bar_format=BAR,
            desc="first step",
        )
        self._closing.callback(self._bar.close)

    def _stage_name(self, stage: int) -> str:
        stages = self.recipe.stages
        return f"stage {stage + 1}/{len(stages)} {stages[stage].name}" if len(stages) > 1 else stages[stage].name

    @property
    def _when(self) -> str:
        who = f"student {self.student}" if self.student else "mean of the students" if any(self.recipe.student_names) else ""
        return f"Step {self.step_number}{who and f', {who}'}"

    def _lap(self) -> float:
        """Seconds since the last report of any kind."""
        before, self._clock_s = self._clock_s, time.monotonic()
        return self._clock_s - before

    def _write(self, values: Mapping[str, Any], kind: str) -> None:
        assert self._metrics is not None and self._page is not None, "the report is closed"
        row = {"step": self.step_number, **_finite(values)}
        try:
            self._metrics.write((json.dumps(row, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"{self._metrics.name} cannot be written: {error.strerror}.\n"
                f"What to do: check that the disk has free space, then {CONTINUE}."
            ) from error
        self._page.curves.add(row)
        self._boards.numbers(self.step_number, kind, values)

    def _write_page(self, only_if_due: bool = False) -> None:
        if self._page is not None and (self._page.is_due or not only_if_due):
            self._page.write(self.step_number, self.time_left.seconds(self.step_number))


def _where(bands: Sequence[str]) -> str:
    """Where a held-out loss is not finite: at noise levels, for students, or everywhere, where it is not divided."""
    if list(bands) == [ONE_BAND]:
        return ""
    return f" {'at the noise levels' if bands[0][:1].isdigit() else 'for'} {', '.join(bands)}"


def cut_metrics(path: Path, last_step: int) -> int:
    """Remove the lines of steps beyond `last_step` and incomplete lines; returns how many were removed."""
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (row := row_of(line)) is not None and row["step"] <= last_step]
    if len(kept) < len(lines):
        replace_file(path, b"".join(kept))
    return len(lines) - len(kept)


def memory_mb() -> dict[str, float]:
    """By name: the peak of memory taken by tensors on the GPU since `reset_peak_memory`, if there is a GPU, and the process's RAM now."""
    ram = {"ram_mb": round(psutil.Process().memory_info().rss / MB, 1)}
    module = counting_module()
    return ram if module is None else {"gpu_peak_mb": round(module.max_memory_allocated() / MB, 1)} | ram


def reset_peak_memory() -> None:
    """Restart the measurement of peak GPU memory."""
    if (module := counting_module()) is not None:
        module.reset_peak_memory_stats()


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with null for NaN and infinity, which JSON does not have."""
    return {name: _finite(value) if isinstance(value, Mapping) else _or_null(value) for name, value in values.items()}


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
