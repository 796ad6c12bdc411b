"""The reports of a run with one student or several: of each student, and of the run, which compares them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .banner import facts_of
from .report import Reporter
from .trial import trials

if TYPE_CHECKING:
    from .batches import Place
    from .boards import Board
    from .distill import StepReport
    from .recipe import Recipe
    from .run_directory import RunDirectory
    from .workshop import Workshop


@dataclass(frozen=True)
class Reports:
    """run: the report of the run. students: those of several students by name; of one student, none beside the run's."""

    run: Reporter
    students: Mapping[str, Reporter]

    @classmethod
    def open(cls, runs: Sequence[RunDirectory | None], recipe: Recipe, step: int, boards: Sequence[Board], stack: ExitStack) -> Reports:
        """Those of the directories of the run and of its students, None on processes other than the main one; the stack closes them."""
        run, students = stack.enter_context(Reporter(runs[0], recipe, step, boards)), {}
        for own, one, name in zip(runs[1:], recipe.each, recipe.student_names, strict=False):
            students[name] = stack.enter_context(Reporter(own, one, step, student=name))
        return cls(run, students)

    @property
    def _of_each(self) -> list[Reporter]:
        return [*self.students.values()] or [self.run]

    def begin(self, workshop: Workshop) -> None:
        """Report what is trained."""
        seconds = trials(workshop)
        self.run.begin(facts_of(workshop.all, self.run.run), seconds)
        for one, reporter in zip(workshop.all, self.students.values(), strict=False):
            reporter.begin(facts_of([one], reporter.run), seconds)

    def step(self, workshop: Workshop, place: Place, steps: Sequence[StepReport]) -> None:
        """Report an optimizer step of each student; the loss of a run with several is their mean."""
        stage, at = workshop.recipe.stages[place.stage], workshop.learner.step
        samples = stage.batch * stage.accumulate
        for reporter, learner, one in zip(self._of_each, workshop.learners, steps, strict=True):
            numbers = {"sigma": one.sigma, "gradient_norm": one.gradient_norm, "learning_rate": one.learning_rate}
            reporter.step(at, one.loss, samples, **numbers, stage=place.stage, skipped_steps=learner.skipped)
        if self.students:
            losses = {f"loss_{name}": one.loss for name, one in zip(self.students, steps, strict=True)}
            shared = {"sigma": steps[0].sigma, "learning_rate": steps[0].learning_rate}
            skipped = sum(learner.skipped for learner in workshop.learners)
            self.run.step(at, statistics.fmean(losses.values()), samples, **shared, **losses, stage=place.stage, skipped_steps=skipped)

    def held_out(self, losses_by_band: Sequence[Mapping[str, float]], samples: int) -> list[float]:
        """Report the held-out loss of each student by band; returns the mean of each one's bands. The run's report has these means."""
        means = [one.held_out(bands, samples) for one, bands in zip(self._of_each, losses_by_band, strict=True)]
        if self.students:
            self.run.held_out({f"student {name}": mean for name, mean in zip(self.students, means, strict=True)}, samples)
        return means

    def saved(self, paths: Sequence[Path]) -> None:
        """Report a checkpoint of each student."""
        for reporter, path in zip(self._of_each, paths, strict=True):
            reporter.saved(path)
        if self.students:
            self.run.saved(paths[0])
