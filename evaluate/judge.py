"""What judges a task's pictures: for each metric a function from questions and pictures to numbers by name."""

# N pictures, H W pixels

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import compbench, ocr
from .questions import Question
from .readers import make_reader
from .suite import PART_OF_METRIC, Suite, Task

if TYPE_CHECKING:
    from .suite import CompbenchPart, OcrPart, WeightsPart

# RGB pictures, uint8 [H, W, 3].
Pictures = Sequence[np.ndarray]
# Questions, an encoder's pictures and the teacher's to what each of them scores, by name of the number.
Judge = Callable[[Sequence[Question], Pictures, Pictures], list[dict[str, float]]]
# Judges of whole sets of pictures and not of each by itself.
OF_SETS = ("fid",)
# Those that look at the teacher's picture too, and so say nothing about the teacher.
AGAINST_TEACHER = ("lpips",)
OF_ATTRIBUTES = ("color", "shape", "texture")


def judged_by(metric: str, suite: Suite) -> dict[str, Any]:
    """What decides a metric's verdicts, besides the pictures."""
    part = getattr(suite, PART_OF_METRIC.get(metric, ""), None)
    return {"metric": metric, "part": None if part is None else part.model_dump()}


def make_judge(metric: str, task: Task, suite: Suite, device: str) -> Judge:
    """The judge of a metric that rates each picture by itself. Raises ValueError with advice if it lacks weights or a package."""
    if metric == "readback":
        return _readback
    part: Any = getattr(suite, PART_OF_METRIC[metric])
    assert part is not None, "the suite is checked"
    if metric == "compbench":
        return _compbench_judge(part, task.prompts.category, device)
    return {"ocr": _ocr_judge, "clip_score": _clip_judge, "lpips": _lpips_judge}[metric](part, device)


def _readback(questions: Sequence[Question], pictures: Pictures, _teachers: Pictures) -> list[dict[str, float]]:
    """Whether the miniature's exact reader finds in the picture all that the scene asks for."""
    from ..miniature.reader import verdict

    pairs = zip(questions, pictures, strict=True)
    return [{"readback": float(verdict(_scene_of(question), picture / 255.0))} for question, picture in pairs]


def _scene_of(question: Question) -> Any:
    assert question.scene is not None, "the suite is checked: readback is for the miniature"
    return question.scene


def _ocr_judge(part: OcrPart, _device: str) -> Judge:
    reader = make_reader(part.reader, Path(part.weights).expanduser() if part.weights else None, part.languages)

    def judge(questions: Sequence[Question], pictures: Pictures, _teachers: Pictures) -> list[dict[str, float]]:
        scores = [ocr.score(question.target or "", reader.read(picture)) for question, picture in zip(questions, pictures, strict=True)]
        return [{"ocr_character": one.character, "ocr_word": one.word, "ocr_sentence": one.sentence} for one in scores]

    return judge


def _clip_judge(part: WeightsPart, device: str) -> Judge:
    from .pictures import ClipScorer

    scorer = ClipScorer(Path(part.weights).expanduser(), device)

    def judge(questions: Sequence[Question], pictures: Pictures, _teachers: Pictures) -> list[dict[str, float]]:
        return [{"clip_score": float(score)} for score in scorer.scores(pictures, [question.prompt for question in questions])]

    return judge


def _lpips_judge(part: WeightsPart, device: str) -> Judge:
    from .distances import Lpips

    network = Lpips(Path(part.weights).expanduser(), device)

    def judge(_questions: Sequence[Question], pictures: Pictures, teachers: Pictures) -> list[dict[str, float]]:
        return [{"lpips": float(distance)} for distance in network.distances(np.stack(pictures), np.stack(teachers))]

    return judge


def _compbench_judge(part: CompbenchPart, category: str, device: str) -> Judge:
    """The judge of a category: the benchmark's formulas on what BLIP-VQA, a detector or a depth estimator sees."""
    from . import compbench_judges as networks

    if category in OF_ATTRIBUTES:
        vqa = networks.BlipVqa(Path(part.vqa).expanduser(), device)
        return _each(category, "", lambda prompt, picture: vqa.score(picture, compbench.noun_phrases(prompt)))
    detector = networks.TransformersDetector(Path(part.detector).expanduser(), device)
    if category == "spatial":
        return _each(category, detector.name, lambda prompt, picture: _spatial(prompt, picture, detector))
    if category == "numeracy":
        return _each(category, detector.name, lambda prompt, picture: compbench.numeracy_score(prompt, detector.detect(picture)))
    depth = networks.TransformersDepth(Path(part.depth).expanduser(), device)

    def in_depth(prompt: str, picture: np.ndarray) -> float:
        return compbench.spatial_3d_score(prompt, detector.detect(picture), depth.nearness(picture))

    return _each(category, detector.name, in_depth)


def _spatial(prompt: str, picture: np.ndarray, detector: Any) -> float:
    height, width, _ = picture.shape
    return compbench.spatial_score(prompt, detector.detect(picture), (width, height))


def _each(category: str, judge_name: str, score: Callable[[str, np.ndarray], float]) -> Judge:
    """A judge that looks at one picture after the other."""
    name = compbench.metric_name(cast(compbench.Category, category), judge_name)

    def judge(questions: Sequence[Question], pictures: Pictures, _teachers: Pictures) -> list[dict[str, float]]:
        return [{name: score(question.prompt, picture)} for question, picture in zip(questions, pictures, strict=True)]

    return judge


def by_number(values: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Scores of pictures by the name of the number."""
    return {name: [one[name] for one in values] for name in (values[0] if values else {})}
