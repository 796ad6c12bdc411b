"""Judges every encoder's images of every task by each metric that the task asks for, each image once."""

# N images, D features

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import numpy as np

from ..runtime.errors import printable
from ..runtime.failure import is_out_of_memory
from .context import Evaluation
from .encoders import EncoderFile
from .judges import by_number, judged_by, make_judge
from .measured import Measured
from .metrics import METRICS, FeatureNetwork, Judge, Metric
from .questions import Question
from .results import Numbers, Scores
from .scores import Unfinished, kept_or_made
from .suite import Task

# Images that a judge sees at once.
AT_ONCE = 16


@dataclass
class Verdicts:
    """Scores of each image, and numbers of whole sets of images by task, number and encoder."""

    images: Scores = field(default_factory=dict)
    sets: Numbers = field(default_factory=dict)


def judge_all(work: Evaluation) -> Verdicts:
    """What all judges say. Raises Stopped if a signal asked for it."""
    found = Verdicts()
    # ComfyUI does not know the judges' networks, and must not fill the memory with its own.
    comfy.model_management.unload_all_models()
    for task in work.suite.tasks:
        of_images, of_sets = found.images.setdefault(task.name, {}), found.sets.setdefault(task.name, {})
        for metric in (METRICS[name] for name in task.metrics):
            judging = Judging(work, task, metric)
            for encoder in work.students if metric.against_teacher else work.encoders:
                work.processes.check_stop()
                with work.processes.piece(f"{encoder.name}: {metric.name} of {task.name}", metric.images * len(judging.asked)):
                    if metric.features is not None:
                        name, measured = judging.distance_of_sets(encoder)
                        of_sets.setdefault(name, {})[encoder.name] = measured
                        continue
                    for number, values in judging.scores(encoder).items():
                        of_images.setdefault(number, {})[encoder.name] = values
    return found


class Judging:
    """One metric of one task; its judge is made for the first image that needs it."""

    def __init__(self, work: Evaluation, task: Task, metric: Metric) -> None:
        self.work, self.task, self.metric = work, task, metric
        self.asked = work.questions[task.name]
        self._judge = functools.cache(lambda: make_judge(metric, task, work.suite, work.device))
        self._photographs = functools.cache(lambda: np.stack(self._in_groups(work.teacher, self._photographed)))

    def scores(self, encoder: EncoderFile) -> dict[str, list[float]]:
        """The scores of an encoder's images, by number."""
        return self._kept(encoder, lambda unfinished: by_number(self._in_groups(encoder, self._judged, unfinished)))

    def distance_of_sets(self, encoder: EncoderFile) -> tuple[str, Measured]:
        """The distance of an encoder's images to the photographs, under the name that says whose features they are."""
        name, content = self._kept(encoder, lambda _unfinished: self._distance(encoder))
        return name, Measured(**content)

    def _kept(self, encoder: EncoderFile, make: Callable[[Unfinished], Any]) -> Any:
        work = self.work
        compared = [encoder, work.teacher] if self.metric.against_teacher else [encoder]
        decided_by = {
            **judged_by(self.metric, work.suite, self.asked),
            "images": [work.made_of(one, self.asked) for one in compared],
        }
        return kept_or_made(work.kept, work.processes.ranks, f"{encoder.name}/{self.task.name}.{self.metric.name}", decided_by, make)

    def _in_groups(
        self, encoder: EncoderFile, work_on: Callable[[EncoderFile, list[Question]], list[Any]], unfinished: Unfinished | None = None
    ) -> list[Any]:
        """What `work_on` makes of every question, in groups that the processes share."""
        groups = [self.asked[start : start + AT_ONCE] for start in range(0, len(self.asked), AT_ONCE)]
        per_group = self.work.processes.map(functools.partial(work_on, encoder), groups, self.metric.images * len(self.asked), unfinished)
        return [one for group in per_group for one in group]

    def _judged(self, encoder: EncoderFile, group: list[Question]) -> list[dict[str, float]]:
        judge: Judge = self._judge()
        teachers = self._images(self.work.teacher, group) if self.metric.against_teacher else []
        return judge(group, self._images(encoder, group), teachers)

    def _images(self, encoder: EncoderFile, group: Sequence[Question]) -> list[np.ndarray]:
        folder = self.work.images(encoder, self.task.name)
        return [read_image(folder.file(question.index)) for question in group]

    def _distance(self, encoder: EncoderFile) -> tuple[str, dict[str, Any]]:
        from .pictures import fid

        network: FeatureNetwork = self._judge()
        features = np.stack(self._in_groups(encoder, self._features))
        return network.metric_name, fid(features, self._photographs()).to_json()

    def _features(self, encoder: EncoderFile, group: list[Question]) -> list[np.ndarray]:
        return [*self._judge().features(np.stack(self._images(encoder, group)))]

    def _photographed(self, _encoder: EncoderFile, group: list[Question]) -> list[np.ndarray]:
        """The features [D] of each photograph, in its own size."""
        photographs = [question.photograph for question in group if question.photograph is not None]
        return [self._judge().features(read_image(photograph)[None])[0] for photograph in photographs]


def read_image(path: Path) -> np.ndarray:
    """An RGB image, uint8 [H, W, 3]. Raises ValueError for a damaged file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))  # writable, as torch wants it
    except Exception as error:  # Pillow raises many kinds for a damaged file
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} is not a complete image: {printable(str(error))}\n"
            "What to do: download a photograph again; delete a generated image, which the same command then generates again."
        ) from error
