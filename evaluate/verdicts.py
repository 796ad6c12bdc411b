"""The judges at work: every encoder's pictures of every task before each judge that the task asks for, each picture once."""

# N pictures, D features

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import numpy as np

from .confidence import Z_95
from .generate import made_of
from .intervals import Measured
from .judge import AGAINST_TEACHER, OF_SETS, by_number, inception, judged_by, make_judge
from .questions import Question
from .results import Scores
from .scores import Part, kept_or_made

if TYPE_CHECKING:
    from .encoders import EncoderFile
    from .run import Evaluation
    from .suite import Task

# Pictures that a judge sees at once.
AT_ONCE = 16


@dataclass
class Verdicts:
    """Scores of pictures, and numbers of whole sets of pictures by task, number and encoder."""

    pictures: Scores = field(default_factory=dict)
    sets: dict[str, dict[str, dict[str, Measured]]] = field(default_factory=dict)


def judge_all(work: Evaluation) -> Verdicts:
    """What all judges say. Raises Stopped if a signal asked for it."""
    found = Verdicts()
    # The judges' networks are not the host's: it must not keep the memory full of its own.
    comfy.model_management.unload_all_models()
    for task in work.suite.tasks:
        of_pictures, of_sets = found.pictures.setdefault(task.name, {}), found.sets.setdefault(task.name, {})
        for metric in task.metrics:
            bench = Bench(work, task, metric)
            for encoder in work.students if metric in AGAINST_TEACHER else work.encoders:
                work.team.leave_if_asked()
                if metric in OF_SETS:
                    name, measured = bench.distance_of_sets(encoder)
                    of_sets.setdefault(name, {})[encoder.name] = measured
                    continue
                for number, values in bench.scores(encoder).items():
                    of_pictures.setdefault(number, {})[encoder.name] = values
    return found


class Bench:
    """One metric of one task; its judge is called in when the first picture comes."""

    def __init__(self, work: Evaluation, task: Task, metric: str) -> None:
        self.work, self.task, self.metric = work, task, metric
        self.asked = work.questions[task.name]
        device = str(work.painter.model.load_device)
        self._judge = functools.cache(lambda: make_judge(metric, task, work.suite, device))
        self._inception = functools.cache(lambda: inception(work.suite, device))
        self._photographs = functools.cache(lambda: np.stack(self._in_groups(work.teacher, self._photographed)))

    def scores(self, encoder: EncoderFile) -> dict[str, list[float]]:
        """The scores of an encoder's pictures, by number."""
        return self._kept(encoder, lambda part: by_number(self._in_groups(encoder, self._judged, part)))

    def distance_of_sets(self, encoder: EncoderFile) -> tuple[str, Measured]:
        """The FID of an encoder's pictures to the photographs, under the name that says whose features they are."""
        name, content = self._kept(encoder, lambda _part: self._fid(encoder))
        return name, Measured.from_json(content)

    def _kept(self, encoder: EncoderFile, make: Callable[[Part], Any]) -> Any:
        work = self.work
        compared = [encoder, work.teacher] if self.metric in AGAINST_TEACHER else [encoder]
        pictures = [made_of(one, work.painter_is, self.asked) for one in compared]
        decided_by = {**judged_by(self.metric, work.suite, self.asked), "pictures": pictures}
        return kept_or_made(work.kept, work.ranks, f"{encoder.name}/{self.task.name}.{self.metric}", decided_by, make)

    def _in_groups(
        self, encoder: EncoderFile, work_on: Callable[[EncoderFile, list[Question]], list[Any]], part: Part | None = None
    ) -> list[Any]:
        """What `work_on` makes of every question, in groups that the processes share."""
        groups = [self.asked[start : start + AT_ONCE] for start in range(0, len(self.asked), AT_ONCE)]
        what = f"{encoder.name}: {self.metric} of {self.task.name}"
        per_group = self.work.team.share_out(groups, functools.partial(work_on, encoder), what, part=part)
        return [one for group in per_group for one in group]

    def _judged(self, encoder: EncoderFile, group: list[Question]) -> list[dict[str, float]]:
        teachers = self._pictures(self.work.teacher, group) if self.metric in AGAINST_TEACHER else []
        return self._judge()(group, self._pictures(encoder, group), teachers)

    def _pictures(self, encoder: EncoderFile, group: Sequence[Question]) -> list[np.ndarray]:
        folder = self.work.pictures(encoder, self.task.name)
        return [read_picture(folder.file(question.index)) for question in group]

    def _fid(self, encoder: EncoderFile) -> tuple[str, dict[str, Any]]:
        from .pictures import fid

        def painted(one: EncoderFile, group: list[Question]) -> list[np.ndarray]:
            return [*self._inception().features(np.stack(self._pictures(one, group)))]

        found = fid(np.stack(self._in_groups(encoder, painted)), self._photographs())
        reach = Z_95 * found.deviation
        measured = Measured(found.value, found.n, found.value - reach, found.value + reach)
        return self._inception().metric_name, measured.to_json()

    def _photographed(self, _encoder: EncoderFile, group: list[Question]) -> list[np.ndarray]:
        return [self._photograph(question) for question in group]

    def _photograph(self, question: Question) -> np.ndarray:
        """The features [D] of the photograph that the prompt was written to, in its own size."""
        assert question.photograph is not None, "the suite is checked: FID has photographs"
        return self._inception().features(read_picture(question.photograph)[None])[0]


def read_picture(path: Path) -> np.ndarray:
    """An RGB picture, uint8 [H, W, 3]."""
    from PIL import Image

    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))  # writable, as torch wants it
