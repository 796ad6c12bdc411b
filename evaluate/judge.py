"""What judges a task's pictures: for each metric a function from questions and pictures to numbers by name."""

# N pictures, H W pixels

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..runtime.optional import needed
from . import compbench, ocr
from .fingerprint import fingerprint
from .questions import Question
from .readers import make_reader
from .suite import PART_OF_METRIC, Suite, Task

if TYPE_CHECKING:
    from .pictures import Inception
    from .suite import CompbenchPart, OcrPart, WeightsPart

# RGB pictures, uint8 [H, W, 3].
Pictures = Sequence[np.ndarray]
# Questions, an encoder's pictures and the teacher's to what each of them scores, by name of the number.
Judge = Callable[[Sequence[Question], Pictures, Pictures], list[dict[str, float]]]
# Judges of whole sets of pictures and not of each by itself.
OF_SETS = ("fid",)
# Those that look at the teacher's picture too, and so say nothing about the teacher.
AGAINST_TEACHER = ("lpips",)
# Fields of a suite's parts that name a file or folder of weights.
NAMES_OF_WEIGHTS = ("weights", "vqa", "detector", "depth")
OF_ATTRIBUTES = ("color", "shape", "texture")


def judged_by(metric: str, suite: Suite, questions: Sequence[Question]) -> dict[str, Any]:
    """What decides a metric's verdicts, besides the pictures: the suite's part, its weights, what the questions compare with."""
    part = getattr(suite, PART_OF_METRIC.get(metric, ""), None)
    said = {} if part is None else part.model_dump()
    weights = {name: _weights_of(str(said[name])) for name in NAMES_OF_WEIGHTS if said.get(name)}
    asked = [[question.target, _photograph_of(question) if metric in OF_SETS else None] for question in questions]
    compared = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return {"metric": metric, "part": said or None, "weights": weights, "compared with": compared}


@functools.cache
def _weights_of(path: str) -> list[list[str]]:
    """Names and fingerprints of a judge's files; empty where nothing lies."""
    place = Path(path).expanduser()
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place] if place.is_file() else []
    return [[file.name, fingerprint(file)] for file in files]


def _photograph_of(question: Question) -> list[Any] | None:
    return None if question.photograph is None else [question.photograph.name, question.photograph.stat().st_size]


def check_judges(suite: Suite) -> None:
    """Call in every judge once and let it go, so that what is missing is told before anything is painted. Raises ValueError."""
    checked: set[tuple[str, str]] = set()
    for task in suite.tasks:
        for metric in task.metrics:
            which = (metric, task.prompts.category if metric == "compbench" else "")
            if metric == "readback" or which in checked:
                continue
            checked.add(which)
            if metric in OF_SETS:
                inception(suite, "cpu")
            else:
                make_judge(metric, task, suite, "cpu")
    if suite.embedding is not None and suite.embedding.map:
        for module, package in (("sklearn.manifold", "scikit-learn"), ("matplotlib.figure", "matplotlib")):
            needed(module, package, "The map of the embeddings")


def inception(suite: Suite, device: str) -> Inception:
    """The network of the suite's FID."""
    from .pictures import Inception

    assert suite.fid is not None, "the suite is checked"
    return Inception(Path(suite.fid.weights).expanduser(), device)


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
    from ..world.reader import verdict

    pairs = zip(questions, pictures, strict=True)
    return [{"readback": float(verdict(_scene_of(question), picture / 255.0))} for question, picture in pairs]


def _scene_of(question: Question) -> Any:
    assert question.scene is not None, "the suite is checked: readback is for the miniature"
    return question.scene


def _ocr_judge(part: OcrPart, device: str) -> Judge:
    reader = make_reader(part.reader, Path(part.weights).expanduser() if part.weights else None, part.languages, device)

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
