"""RUN/page.html: a run's curves, images, recipe and warnings on one page that needs no network and no server."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime.disk import replace_file
from ..runtime.pages import filled, page_template
from ..runtime.stop import Stopped
from .curves import Curves, with_sign
from .recipe import Recipe, load_recipe
from .run_directory import RunDirectory

TEMPLATE = Path(__file__).resolve().parent / "page.html"
SAMPLE = re.compile(r"step-(\d{6,})-([\w-]+)\.jpg")
# The page is written at most this often, and takes at most this share of the time.
INTERVAL_S, SHARE = 10.0, 0.01
LOG_BYTES, MOST_WARNINGS = 1 << 20, 30
WARNING = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (WARNING|ERROR|CRITICAL) (.*)$")
UNITS = {"gpu_peak_mb": "GPU memory, peak", "ram_mb": "RAM"}
log = logging.getLogger(__name__)


class RunPage:
    """The page of one run, from its files and from the metrics that are added while it trains.

    facts: what is trained, in lines. state: starting, training, stopped, finished or failed. failure: why it failed.
    """

    def __init__(self, run: RunDirectory, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.facts: dict[str, str] = {}
        self.state, self.failure = "training", ""
        self.curves = Curves.of(run.metrics)
        # Read once: the pack may be updated while a long run trains.
        self._template = page_template(TEMPLATE)
        self._next_s = 0.0
        self._works = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the page again."""
        return time.monotonic() >= self._next_s

    def write(self, step: int, left_s: float | None) -> None:
        """Replace RUN/page.html. On a full disk the page stays as it was, with one warning."""
        begin = time.monotonic()
        try:
            replace_file(self.run.page, self.html(step, left_s).encode())
            self._works = True
        except OSError as error:
            if self._works:
                log.warning("%s cannot be written (%s); the run continues.", self.run.page, error)
            self._works = False
        now = time.monotonic()
        self._next_s = now + max(INTERVAL_S, (now - begin) / SHARE)

    def html(self, step: int, left_s: float | None) -> str:
        """The page, after `step` steps."""
        return filled(self._template, self._data(step, left_s))

    def _data(self, step: int, left_s: float | None) -> dict[str, Any]:
        curves = self.curves
        return {
            "name": self.recipe.output.name,
            "recipeName": self.recipe.name,
            "state": self.state,
            "failure": self.failure,
            "written": round(time.time()),
            "interval": INTERVAL_S,
            "step": step,
            "left": left_s,
            "facts": self.facts,
            "numbers": dict(self._numbers()),
            "stages": list(self._stages()),
            "heldOut": {with_sign("\u03c3", band): curve.points() for band, curve in curves.held_out.items()},
            "learningRate": curves.learning_rate.points(),
            "throughput": curves.throughput.points(),
            "samples": samples_of(self.run.samples),
            "recipe": self.recipe.to_toml(),
            "history": self.run.recipe_changes(),
            "warnings": warnings_of(self.run.log),
        }

    def _numbers(self) -> Iterator[tuple[str, str]]:
        newest, best = self.curves.newest, self.curves.best
        if "loss" in newest:
            yield "loss, last step", "not finite" if newest["loss"] is None else f"{newest['loss']:.4g}"
        if best is not None:
            yield "lowest held-out loss", f"{best[1]:.4g} at step {best[0]:,}"
        if steps := len(self.curves.recent_rates):
            yield f"throughput, last {steps} steps" if steps > 1 else "throughput", f"{self.curves.prompts_per_s:.3g} prompts/s"
        for name, label in UNITS.items():
            if name in newest:
                yield label, f"{newest[name] / 1000:.2f} GB"
        if newest.get("skipped_steps"):
            yield "dropped steps", f"{newest['skipped_steps']:,}"

    def _stages(self) -> Iterator[dict[str, Any]]:
        begin, mean = 0, ", mean of the students" if any(self.recipe.student_names) else ""
        for number, stage in enumerate(self.recipe.stages):
            curve = self.curves.loss.get(number)
            points = curve.points() if curve else []
            place = {"begin": begin, "end": begin + stage.steps, "trajectory": self.recipe.trajectory_steps(stage)}
            yield {"name": stage.name, "objective": f"{stage.what}{mean}", **place, "loss": points}
            begin += stage.steps


@contextlib.contextmanager
def starting(run: RunDirectory) -> Iterator[None]:
    """Say on the page of a run whose models are being loaded that it is starting, and if it cannot start, why."""
    page = RunPage(run, load_recipe(str(run.recipe)))
    step, page.state = page.curves.newest.get("step", 0), "starting"
    page.write(step, None)
    try:
        yield
    except BaseException as error:
        page.state, page.failure = ("stopped", "") if isinstance(error, Stopped) else ("failed", str(error))
        page.write(step, None)
        raise


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """Step, name and file of every image of a run, in the order of steps."""
    found = [(int(match[1]), match[2], path.name) for path in folder.glob("*.jpg") if (match := SAMPLE.fullmatch(path.name))]
    return [{"step": step, "name": name, "file": file} for step, name, file in sorted(found)]


def warnings_of(path: Path) -> list[str]:
    """The newest warnings and errors at the end of a run's log; equal ones once."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    found = {match[3]: f"{match[1]} {match[3]}" for line in lines if (match := WARNING.match(line))}
    return list(found.values())[-MOST_WARNINGS:]
