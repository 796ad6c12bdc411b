"""The metrics: each is one record. A new one takes a record here and its pure function.

A metric of images names the numbers that it gives, how they are written and compared, the table of the suite and the weights that it
needs, and makes its judge; a mean with its interval is made of what the judge says of each image, or of their features (FID).
"""

# N images, H W pixels, D features

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from ..config.parts import FROM_LIST, NOT_EMPTY, FilePath, OptionalPath, Part, Text
from . import compbench
from .questions import Prompts, Question


class OcrPart(Part):
    """What reads the text in images."""

    reader: Literal["easyocr", "tesseract"] = Field(description="easyocr, as in the paper, or the system's tesseract")
    weights: OptionalPath = Field(default="", description='folder of its weights; "" for its default')
    languages: Annotated[tuple[Text, ...], FROM_LIST, NOT_EMPTY] = Field(description="languages it reads, by EasyOCR's codes")


class WeightsPart(Part):
    """A network that judges images, from this machine; nothing is downloaded."""

    weights: FilePath = Field(
        description="clip_score: a Hugging Face folder of CLIP; fid: the file of Inception; lpips: the file of AlexNet"
    )


class CompbenchPart(Part):
    """The networks that judge T2I-CompBench."""

    vqa: FilePath = Field(description="folder of BLIP-VQA (colour, shape, texture)")
    detector: FilePath = Field(description="folder of the object detector (2D and 3D position, count)")
    depth: OptionalPath = Field(default="", description='folder of the depth estimator (3D position); "" if no task asks for it')


# RGB images, uint8 [H, W, 3].
Images = Sequence[np.ndarray]
# Questions, an encoder's images and the teacher's, to what each image scores, by name of the number.
Judge = Callable[[Sequence[Question], Images, Images], list[dict[str, float]]]


class FeatureNetwork(Protocol):
    """The network of a metric that compares features of two sets of images; its name for the metric says which network it is."""

    metric_name: str

    def features(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Features [N, D] of RGB images of one size, uint8 [N, H, W, 3]."""
        ...


@dataclass(frozen=True)
class Number:
    """How a number is written and compared: label ("": its own name), unit, factor to that unit, digits after the point; span: the width
    of its range, by which losses of several numbers are averaged."""

    label: str = ""
    unit: str = "%"
    factor: float = 100.0
    digits: int = 1
    higher_is_better: bool = True
    span: float = 1.0

    def written(self, value: float) -> str:
        """The value in its unit."""
        return f"{self.factor * value:.{self.digits}f}"

    def loss(self, teacher: float, student: float) -> float:
        """By how much a student is worse."""
        return teacher - student if self.higher_is_better else student - teacher


@dataclass(frozen=True)
class Metric:
    """A metric of images.

    about: for the suite's documentation. numbers: what it gives, by the beginning of the name in results.json. fits: whether prompts have
    what it compares with. table: the suite's table with its settings, and weights: the fields of it that name weights. judge: made of that
    table, the task's category and a device; it scores each image. features: for a metric of whole sets, the network instead.
    against_teacher: compares with the teacher's image, so the teacher has no score. judge and features raise ValueError, with advice, if
    weights or a package are missing.
    """

    name: str
    about: str
    numbers: Mapping[str, Number]
    fits: Callable[[Prompts], bool] = lambda _prompts: True
    table: str | None = None
    weights: tuple[str, ...] = ()
    judge: Callable[[Any, str, str], Judge] | None = None
    features: Callable[[Any, str], FeatureNetwork] | None = None
    against_teacher: bool = False


def _readback(_table: None, _category: str, _device: str) -> Judge:
    from ..world.reader import verdict

    def right(question: Question, image: np.ndarray) -> float:
        assert question.scene is not None, "the suite is checked: readback is for the miniature"
        return float(verdict(question.scene, image / 255.0))

    def judge(questions: Sequence[Question], images: Images, _teachers: Images) -> list[dict[str, float]]:
        return [{"readback": right(question, image)} for question, image in zip(questions, images, strict=True)]

    return judge


def _ocr(table: OcrPart, _category: str, device: str) -> Judge:
    from . import ocr
    from .readers import make_reader

    reader = make_reader(table.reader, Path(table.weights).expanduser() if table.weights else None, table.languages, device)

    def judge(questions: Sequence[Question], images: Images, _teachers: Images) -> list[dict[str, float]]:
        scores = [ocr.score(question.target or "", reader.read(image)) for question, image in zip(questions, images, strict=True)]
        return [{"ocr_character": one.character, "ocr_word": one.word, "ocr_sentence": one.sentence} for one in scores]

    return judge


def _clip_score(table: WeightsPart, _category: str, device: str) -> Judge:
    from .pictures import ClipScorer

    scorer = ClipScorer(Path(table.weights).expanduser(), device)

    def judge(questions: Sequence[Question], images: Images, _teachers: Images) -> list[dict[str, float]]:
        return [{"clip_score": float(score)} for score in scorer.scores(images, [question.prompt for question in questions])]

    return judge


def _lpips(table: WeightsPart, _category: str, device: str) -> Judge:
    from .distances import Lpips

    network = Lpips(Path(table.weights).expanduser(), device)

    def judge(_questions: Sequence[Question], images: Images, teachers: Images) -> list[dict[str, float]]:
        return [{"lpips": float(distance)} for distance in network.distances(np.stack(images), np.stack(teachers))]

    return judge


def _fid(table: WeightsPart, device: str) -> FeatureNetwork:
    from .pictures import Inception

    return Inception(Path(table.weights).expanduser(), device)


def _compbench(table: CompbenchPart, category: str, device: str) -> Judge:
    """The benchmark's formula for a category, on what BLIP-VQA, a detector or a depth estimator sees."""
    from . import compbench_judges as networks

    if category in compbench.ATTRIBUTES:
        vqa = networks.BlipVqa(Path(table.vqa).expanduser(), device)
        return _each(category, "", lambda prompt, image: vqa.score(image, compbench.noun_phrases(prompt)))
    detector = networks.TransformersDetector(Path(table.detector).expanduser(), device)
    if category == "spatial":
        return _each(
            category, detector.name, lambda prompt, image: compbench.spatial_score(prompt, detector.detect(image), image.shape[:2])
        )
    if category == "numeracy":
        return _each(category, detector.name, lambda prompt, image: compbench.numeracy_score(prompt, detector.detect(image)))
    depth = networks.TransformersDepth(Path(table.depth).expanduser(), device)

    def in_depth(prompt: str, image: np.ndarray) -> float:
        return compbench.spatial_3d_score(prompt, detector.detect(image), depth.nearness(image))

    return _each(category, detector.name, in_depth)


def _each(category: str, judge_name: str, score: Callable[[str, np.ndarray], float]) -> Judge:
    """A judge that sees one image at a time."""
    name = compbench.metric_name(category, judge_name)

    def judge(questions: Sequence[Question], images: Images, _teachers: Images) -> list[dict[str, float]]:
        return [{name: score(question.prompt, image)} for question, image in zip(questions, images, strict=True)]

    return judge


RECORDS = (
    Metric(
        "ocr",
        "the text that is asked for is read: common_text, or a file with a target",
        {"ocr_character": Number("characters"), "ocr_word": Number("words"), "ocr_sentence": Number("sentences")},
        lambda prompts: (
            bool(prompts.target) or prompts.kind == "common_text" or (prompts.kind == "miniature" and "word" in prompts.category)
        ),
        table="ocr",
        weights=("weights",),
        judge=_ocr,
    ),
    Metric(
        "readback",
        "the miniature's exact reader",
        {"readback": Number("right")},
        lambda prompts: prompts.kind == "miniature",
        judge=_readback,
    ),
    Metric(
        "clip_score",
        "image and prompt",
        {"clip_score": Number("CLIP", "", 1.0, 2, span=100.0)},
        table="clip_score",
        weights=("weights",),
        judge=_clip_score,
    ),
    Metric(
        "fid",
        "against the photographs",
        {"FID": Number("", "", 1.0, 2, higher_is_better=False)},
        lambda prompts: bool(prompts.pictures),
        table="fid",
        weights=("weights",),
        features=_fid,
    ),
    Metric(
        "compbench",
        "as its category",
        {"CompBench": Number()},
        lambda prompts: prompts.kind == "compbench",
        table="compbench",
        weights=("vqa", "detector", "depth"),
        judge=_compbench,
    ),
    Metric(
        "lpips",
        "against the teacher's image of the same seed",
        {"lpips": Number("LPIPS", "", 1.0, 3, higher_is_better=False)},
        table="lpips",
        weights=("weights",),
        judge=_lpips,
        against_teacher=True,
    ),
)
METRICS = {metric.name: metric for metric in RECORDS}
NUMBERS = {name: number for metric in RECORDS for name, number in metric.numbers.items()}
# What is measured of the encoders themselves, and the caption of its table.
PROBES = {
    "collapse": "Collapse: mean distance of pooled embeddings, and their effective rank",
    "velocity_gap": "Velocity gap to the teacher by noise level",
    "latent_distance": "Distance of the latents from the teacher's (root mean square)",
    "cost": "Memory and time",
}


def number_of(name: str) -> Number:
    """The record of a number; a name may say more than the record's, as in "FID (other Inception)"."""
    number = next(number for known, number in NUMBERS.items() if name.startswith(known))
    return number if number.label else replace(number, label=name)
