"""How long a run still takes: steps of each stage, and validations, previews and checkpoints, at their measured cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .recipe import Recipe


@dataclass
class Cost:
    """The mean of measured seconds. The first measurement includes warm-up: it counts only until there is another one."""

    first_s: float | None = None
    sum_s: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """Measure once more."""
        if self.first_s is None:
            self.first_s = seconds
        else:
            self.sum_s, self.count = self.sum_s + seconds, self.count + 1

    @property
    def mean_s(self) -> float | None:
        """Seconds each time; None before the first measurement."""
        return self.sum_s / self.count if self.count else self.first_s


@dataclass
class TimeLeft:
    """The costs measured so far.

    stages: optimizer steps of each stage. every: steps between two events of a kind, such as validations. step_cost: by stage; those of
    stages that have not begun may be measured in a trial. event_cost: by kind.
    """

    stages: Sequence[int]
    every: Mapping[str, int]
    step_cost: dict[int, Cost] = field(default_factory=dict)
    event_cost: dict[str, Cost] = field(default_factory=dict)
    in_trial: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe) -> TimeLeft:
        """Nothing is measured yet."""
        every = {"validation": recipe.validation.every_steps, "checkpoint": recipe.checkpoints.every_steps}
        if recipe.preview.vae:
            every["preview"] = recipe.preview.every_steps
        return cls([stage.steps for stage in recipe.stages], every)

    def step(self, stage: int, seconds: float) -> None:
        """An optimizer step of a stage took this long."""
        self.step_cost.setdefault(stage, Cost()).add(seconds)

    def event(self, kind: str, seconds: float) -> None:
        """A validation, preview or checkpoint took this long."""
        self.event_cost.setdefault(kind, Cost()).add(seconds)

    def seconds(self, step: int) -> float | None:
        """Seconds until the last step, after `step` steps; None while the cost of a stage is not known."""
        total, begin = 0.0, 0
        for number, steps in enumerate(self.stages):
            left = steps - min(steps, max(0, step - begin))
            begin += steps
            if left:
                each = self._step_s(number)
                if each is None:
                    return None
                total += left * each
        return total + sum(self._events_left(kind, step) * (cost.mean_s or 0.0) for kind, cost in self.event_cost.items())

    def _step_s(self, stage: int) -> float | None:
        measured = self.step_cost.get(stage)
        return self.in_trial.get(stage) if measured is None else measured.mean_s

    def _events_left(self, kind: str, step: int) -> int:
        every, total = self.every.get(kind, 0), sum(self.stages)
        if not every or step >= total:
            return 0
        return total // every - step // every + (total % every > 0)
