"""The judges at work: every encoder's pictures of every task before each judge that the task asks for, each picture once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management
import numpy as np

from .generate import made_of
from .judge import AGAINST_TEACHER, Judge, by_number, judged_by, make_judge
from .probes import shared_out
from .questions import Question
from .results import Scores
from .scores import kept_or_made
from .store import PictureFolder

if TYPE_CHECKING:
    from ..train.stop import StopRequest
    from .encoders import EncoderFile
    from .run import Evaluation
    from .suite import Task

# Pictures that a judge sees at once.
AT_ONCE = 16


def judge_all(work: Evaluation, stop: StopRequest) -> Scores | None:
    """The scores of every picture; None if a signal asked to stop."""
    scores: Scores = {}
    comfy.model_management.unload_all_models()
    for task in work.suite.tasks:
        numbers = scores.setdefault(task.name, {})
        for metric in task.metrics:
            bench = Bench(work, metric)
            for encoder in bench.encoders():
                if work.ranks.any_of(stop.requested):
                    return None
                for number, values in bench.verdicts(task, encoder).items():
                    numbers.setdefault(number, {})[encoder.name] = values
    return scores


class Bench:
    """One metric with its judge, who is called in when the first picture comes."""

    def __init__(self, work: Evaluation, metric: str) -> None:
        self.work = work
        self.metric = metric
        self._judge: Judge | None = None

    def encoders(self) -> Sequence[EncoderFile]:
        """Whose pictures are judged."""
        return self.work.students if self.metric in AGAINST_TEACHER else self.work.encoders

    def verdicts(self, task: Task, encoder: EncoderFile) -> dict[str, list[float]]:
        """The scores of an encoder's pictures of a task, by number."""
        work, asked = self.work, self.work.questions[task.name]
        compared = [encoder, work.teacher] if self.metric in AGAINST_TEACHER else [encoder]
        pictures = [made_of(one, work.painter_is, asked) for one in compared]
        decided_by = {**judged_by(self.metric, work.suite), "pictures": pictures}
        name = f"{encoder.name}/{task.name}.{self.metric}"
        return kept_or_made(work.kept, work.ranks, name, decided_by, lambda: self._judged(task, encoder, asked))

    def _judged(self, task: Task, encoder: EncoderFile, asked: list[Question]) -> dict[str, list[float]]:
        folder, teachers = (self.work.pictures(one, task.name) for one in (encoder, self.work.teacher))
        groups = [asked[start : start + AT_ONCE] for start in range(0, len(asked), AT_ONCE)]
        what = f"{encoder.name}: {self.metric} of {task.name}"
        with self.work.bar(len(groups[self.work.ranks.rank :: self.work.ranks.world]), what, "batch") as bar:

            def of_group(group: list[Question]) -> list[dict[str, float]]:
                if self._judge is None:
                    self._judge = make_judge(self.metric, self.work.suite)
                against = teachers if self.metric in AGAINST_TEACHER else None
                found = self._judge(group, _pictures(folder, group), [] if against is None else _pictures(against, group))
                bar.update()
                return found

            per_group = shared_out(self.work.ranks, groups, of_group)
        return by_number([one for group in per_group for one in group])


def _pictures(folder: PictureFolder, questions: Sequence[Question]) -> list[np.ndarray]:
    return [read_picture(folder.file(question.index)) for question in questions]


def read_picture(path: Path) -> np.ndarray:
    """An RGB picture, uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
