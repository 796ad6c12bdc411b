"""What judges a task's pictures: for each metric a function from questions and pictures to numbers by name."""

# H W pixels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ocr
from .questions import Question
from .readers import make_reader
from .suite import PART_OF_METRIC, Suite

if TYPE_CHECKING:
    from .suite import OcrPart

# RGB pictures, uint8 [H, W, 3].
Pictures = Sequence[np.ndarray]
# Questions, an encoder's pictures and the teacher's to what each of them scores, by name of the number.
Judge = Callable[[Sequence[Question], Pictures, Pictures], list[dict[str, float]]]
# Judges of whole sets of pictures and not of each by itself.
OF_SETS = ("fid",)
# Those that look at the teacher's picture too, and so say nothing about the teacher.
AGAINST_TEACHER = ("lpips",)


def judged_by(metric: str, suite: Suite) -> dict[str, Any]:
    """What decides a metric's verdicts, besides the pictures."""
    part = getattr(suite, PART_OF_METRIC.get(metric, ""), None)
    return {"metric": metric, "part": None if part is None else part.model_dump()}


def make_judge(metric: str, suite: Suite) -> Judge:
    """The judge of a metric that rates each picture by itself. Raises ValueError with advice if it lacks weights or a package."""
    if metric == "readback":
        return _readback
    if metric == "ocr":
        assert suite.ocr is not None, "the suite is checked"
        return _ocr_judge(suite.ocr)
    raise AssertionError(metric)


def _readback(questions: Sequence[Question], pictures: Pictures, _teachers: Pictures) -> list[dict[str, float]]:
    """Whether the miniature's exact reader finds in the picture all that the scene asks for."""
    from ..miniature.reader import verdict

    pairs = zip(questions, pictures, strict=True)
    return [{"readback": float(verdict(_scene_of(question), picture / 255.0))} for question, picture in pairs]


def _scene_of(question: Question) -> Any:
    assert question.scene is not None, "the suite is checked: readback is for the miniature"
    return question.scene


def _ocr_judge(part: OcrPart) -> Judge:
    reader = make_reader(part.reader, Path(part.weights).expanduser() if part.weights else None, part.languages)

    def judge(questions: Sequence[Question], pictures: Pictures, _teachers: Pictures) -> list[dict[str, float]]:
        scores = [ocr.score(question.target or "", reader.read(picture)) for question, picture in zip(questions, pictures, strict=True)]
        return [{"ocr_character": one.character, "ocr_word": one.word, "ocr_sentence": one.sentence} for one in scores]

    return judge


def by_number(values: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Scores of pictures by the name of the number."""
    return {name: [one[name] for one in values] for name in (values[0] if values else {})}
