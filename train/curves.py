"""The curves of a run, thinned as they grow: hundreds of thousands of steps take as little memory and page as hundreds."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A curve has at most this many points; each is the mean of neighbouring steps.
MOST_POINTS = 400
DIGITS = 5
# The throughput that is shown is that of so many steps: single ones also encode a chunk of prompts, and are slow.
RECENT_STEPS = 50
# The band of a held-out loss that is the last stage's objective.
ONE_BAND = "all"


@dataclass
class Curve:
    """Points [step, mean], of `width` neighbouring steps each. The width doubles when there are too many points."""

    width: int = 1
    _sums: dict[int, tuple[int, float, int]] = field(default_factory=dict)

    def add(self, step: int, value: float | None) -> None:
        """Add one value; None, which stands for a number that is not finite, leaves a gap."""
        if value is None:
            return
        _, total, count = self._sums.get(step // self.width, (0, 0.0, 0))
        self._sums[step // self.width] = (step, total + value, count + 1)
        if len(self._sums) > MOST_POINTS:
            self._halve()

    def points(self) -> list[tuple[int, float]]:
        """The last step and the mean value of each point."""
        return [(step, float(f"{total / count:.{DIGITS}g}")) for step, total, count in self._sums.values()]

    def _halve(self) -> None:
        self.width *= 2
        wider: dict[int, tuple[int, float, int]] = {}
        for place, (step, total, count) in self._sums.items():
            _, before, counted = wider.get(place // 2, (0, 0.0, 0))
            wider[place // 2] = (step, before + total, counted + count)
        self._sums = wider


@dataclass
class Curves:
    """All curves of a run: loss by stage, held-out loss by band, learning rate, throughput; and the newest line of metrics."""

    loss: dict[int, Curve] = field(default_factory=dict)
    held_out: dict[str, Curve] = field(default_factory=dict)
    learning_rate: Curve = field(default_factory=Curve)
    throughput: Curve = field(default_factory=Curve)
    recent_rates: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    newest: dict[str, Any] = field(default_factory=dict)
    best: tuple[int, float] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a line of metrics.jsonl, as the reporter writes it."""
        step = row["step"]
        if "held_out_by_band" in row:
            if (ONE_BAND in row["held_out_by_band"]) != (ONE_BAND in self.held_out):
                # Runs that only imitate were measured by the velocity gap in earlier versions: the two are not compared.
                self.held_out, self.best = {}, None
            for band, value in row["held_out_by_band"].items():
                self.held_out.setdefault(band, Curve()).add(step, value)
            mean = row.get("held_out_loss")
            if mean is not None and (self.best is None or mean < self.best[1]):
                self.best = (step, mean)
            return
        self.loss.setdefault(row.get("stage", 0), Curve()).add(step, row.get("loss"))
        self.learning_rate.add(step, row.get("learning_rate"))
        self.throughput.add(step, row.get("samples_per_s"))
        if row.get("stage") != self.newest.get("stage"):
            self.recent_rates.clear()
        if rate := row.get("samples_per_s"):
            self.recent_rates.append(rate)
        self.newest = dict(row)

    @property
    def prompts_per_s(self) -> float:
        """Prompts per second of the recent steps of the stage, each of which has equally many prompts; 0 before the first."""
        return statistics.harmonic_mean(self.recent_rates) if self.recent_rates else 0.0

    @classmethod
    def of(cls, metrics: Path) -> Curves:
        """Those of the complete lines of a metrics.jsonl; empty ones without the file."""
        curves = cls()
        if metrics.is_file():
            with metrics.open("rb") as lines:
                curves.add_lines(lines)
        return curves

    def add_lines(self, lines: Iterable[bytes]) -> None:
        """Add the complete lines of metrics.jsonl."""
        for line in lines:
            if (row := row_of(line)) is not None:
                self.add(row)


def with_sign(sign: str, band: str) -> str:
    """A band of noise levels with their sign; what is not of noise levels (one band, a student's mean) alone."""
    return f"{sign} {band}" if band[:1].isdigit() else band


def row_of(line: bytes) -> dict[str, Any] | None:
    """The values of a line of metrics.jsonl; None if it is cut off or damaged."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    return values if all(_is_valid(name, value) for name, value in values.items()) else None


def _is_valid(name: str, value: Any) -> bool:
    if name == "held_out_by_band":
        return isinstance(value, dict) and all(_is_valid(band, mean) for band, mean in value.items())
    return value is None or (isinstance(value, int | float) and math.isfinite(value))
