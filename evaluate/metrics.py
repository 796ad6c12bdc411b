"""What an evaluation measures: each metric and each probe is one record. A new one takes a record here and its pure function.

A record names its numbers (what they mean, how they are written, which is better), the table of the suite that sets it, and what it needs.
The suite's tables, its documentation, and the tables and the index of the page follow from the records.
"""

# N images, H W pixels, D features

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from ..config.parts import FROM_LIST, NOT_EMPTY, Count, FilePath, OptionalPath, Part, Text
from . import compbench
from .questions import Prompts, Question


class OcrPart(Part):
    """What reads the text in images."""

    reader: Literal["easyocr", "tesseract"] = Field(description="easyocr, as in the paper, or the system's tesseract")
    weights: OptionalPath = Field(default="", description='folder of its weights; "" for its default')
    languages: Annotated[tuple[Text, ...], FROM_LIST, NOT_EMPTY] = Field(description="languages it reads, by EasyOCR's codes")


class ClipScorePart(Part):
    """The CLIP that compares image and prompt."""

    weights: FilePath = Field(description="a Hugging Face folder of CLIP")


class FidPart(Part):
    """The Inception whose features FID compares."""

    weights: FilePath = Field(description="the file of Inception, as torch-fidelity publishes it")


class LpipsPart(Part):
    """The AlexNet below LPIPS."""

    weights: FilePath = Field(description="the file of AlexNet, as torchvision publishes it")


class CompbenchPart(Part):
    """The networks that judge T2I-CompBench."""

    vqa: FilePath = Field(description="folder of BLIP-VQA (colour, shape, texture)")
    detector: FilePath = Field(description="folder of the object detector (2D and 3D position, count)")
    depth: OptionalPath = Field(default="", description='folder of the depth estimator (3D position); "" if no task asks for it')


class EmbeddingPart(Part):
    """Collapse: the distances between the embeddings of different prompts."""

    prompts: int = Field(ge=3, description="prompts encoded, from all tasks in turn")
    map: bool = Field(description="draw the t-SNE map of teacher and student (needs scikit-learn and matplotlib)")


class VelocityGapPart(Part):
    """The mean squared difference of the two velocities, on the suite's prompts, along the teacher's trajectories."""

    prompts: int = Field(ge=2, description="prompts measured, from all tasks in turn")
    sigma_bands: Count = Field(description="bands of equal width between noise levels 0 and 1; the gap is reported for each")


class LatentDistancePart(Part):
    """The distance of the student's latent from the teacher's of the same seed, after each denoising step."""

    prompts: int = Field(ge=2, description="prompts measured, from all tasks in turn")


class CostPart(Part):
    """Memory and time of each encoder."""

    repeats: int = Field(ge=2, description="measurements of each")

    @property
    def prompts(self) -> int:
        """Prompts that are encoded in turn."""
        return self.repeats + 1


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
    """What a number means, and how it is written and compared.

    meaning: a sentence for readers. label ("": its own name), unit, factor to that unit, form: as Python formats the value. most: the end
    of its range, which begins at 0. proportion: whether it is a proportion of success, from 0 to 1: such numbers are
    compared as shares of the teacher's.
    """

    meaning: str
    label: str = ""
    unit: str = "%"
    factor: float = 100.0
    form: str = ".1f"
    higher_is_better: bool = True
    most: float = 1.0
    proportion: bool = True

    @property
    def span(self) -> float:
        """The width of its range, 1 where it has no end: losses of several numbers are averaged as shares of it."""
        return self.most if math.isfinite(self.most) else 1.0

    @property
    def head(self) -> str:
        """Label and unit, for the head of a column."""
        return self.label + (f", {self.unit}" if self.unit else "")

    def written(self, value: float) -> str:
        """The value in its unit."""
        return f"{self.factor * value:{self.form}}"

    def loss(self, teacher: float, student: float) -> float:
        """By how much a student is worse."""
        return teacher - student if self.higher_is_better else student - teacher


def plain(meaning: str, label: str = "", unit: str = "", factor: float = 1.0, form: str = ".2f") -> Number:
    """A number that is not a share, has no upper end, and is better if it is smaller."""
    return Number(meaning, label, unit, factor, form, higher_is_better=False, most=math.inf, proportion=False)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What metrics and probes have in common.

    about: for the suite's documentation and above the table of its numbers. numbers: what it gives, by the beginning of the name in
    results.json. part: the type of the suite's table with its settings, which is called `table` ("": as the record). against_teacher:
    compares with the teacher, who has no such number. images: a prompt takes as long as so many images, roughly, for the time left.
    least: the prompts that it needs at least.
    """

    name: str
    about: str
    numbers: Mapping[str, Number]
    part: type[Part] | None = None
    table: str = ""
    against_teacher: bool = False
    images: float = 0.05
    least: int = 1

    @property
    def table_name(self) -> str:
        return self.table or self.name


@dataclass(frozen=True, kw_only=True)
class Metric(Record):
    """A metric of images: the mean of what a judge says of each image, or a distance of all images' features.

    fits: whether prompts have what it compares with. weights: the fields of its table that name weights. judge: made of that table, the
    task's category and a device; it scores each image. features: for a metric of whole sets, the network instead. Both raise ValueError,
    with advice, if weights or a package are missing.
    """

    fits: Callable[[Prompts], bool] = lambda _prompts: True
    weights: tuple[str, ...] = ()
    judge: Callable[[Any, str, str], Judge] | None = None
    features: Callable[[Any, str], FeatureNetwork] | None = None


@dataclass(frozen=True, kw_only=True)
class Probe(Record):
    """What is measured of an encoder itself, by the function of this name in `probes`.

    by_machine: the machine decides its numbers. keeps_vectors: of the mean embedding of each prompt, which its table's `map` shows.
    """

    by_machine: bool = False
    keeps_vectors: bool = False


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


def _clip_score(table: ClipScorePart, _category: str, device: str) -> Judge:
    from .pictures import ClipScorer

    scorer = ClipScorer(Path(table.weights).expanduser(), device)

    def judge(questions: Sequence[Question], images: Images, _teachers: Images) -> list[dict[str, float]]:
        return [{"clip_score": float(score)} for score in scorer.scores(images, [question.prompt for question in questions])]

    return judge


def _lpips(table: LpipsPart, _category: str, device: str) -> Judge:
    from .distances import Lpips

    network = Lpips(Path(table.weights).expanduser(), device)

    def judge(_questions: Sequence[Question], images: Images, teachers: Images) -> list[dict[str, float]]:
        return [{"lpips": float(distance)} for distance in network.distances(np.stack(images), np.stack(teachers))]

    return judge


def _fid(table: FidPart, device: str) -> FeatureNetwork:
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


METRIC_RECORDS = (
    Metric(
        name="ocr",
        about="the text that is asked for is read: common_text, or a file with a target",
        numbers={
            "ocr_character": Number("Share of the expected characters that OCR reads at their own place.", "characters"),
            "ocr_word": Number("Share of the expected words that OCR reads as words of their own.", "words"),
            "ocr_sentence": Number("Share of the images in which OCR reads all expected words, consecutively and in order.", "sentences"),
        },
        fits=lambda prompts: (
            bool(prompts.target) or prompts.kind == "common_text" or (prompts.kind == "miniature" and "word" in prompts.category)
        ),
        part=OcrPart,
        weights=("weights",),
        judge=_ocr,
    ),
    Metric(
        name="readback",
        about="the miniature's exact reader",
        numbers={"readback": Number("Share of the images that show everything that the caption asks for.", "correct")},
        fits=lambda prompts: prompts.kind == "miniature",
        judge=_readback,
    ),
    Metric(
        name="clip_score",
        about="image and prompt",
        numbers={
            "clip_score": Number(
                "How well image and prompt match: 100 times their cosine in CLIP.", "CLIP", "", 1.0, ".2f", most=100.0, proportion=False
            )
        },
        part=ClipScorePart,
        weights=("weights",),
        judge=_clip_score,
    ),
    Metric(
        name="fid",
        about="against the photographs",
        numbers={"FID": plain("Distance of the images to photographs of the same captions in Inception's features; smaller is better.")},
        fits=lambda prompts: bool(prompts.photographs),
        part=FidPart,
        weights=("weights",),
        features=_fid,
        least=2,
    ),
    Metric(
        name="compbench",
        about="as its category",
        numbers={"CompBench": Number("T2I-CompBench's score: whether objects have the attributes, places or numbers asked for.")},
        fits=lambda prompts: prompts.kind == "compbench",
        part=CompbenchPart,
        weights=("vqa", "detector", "depth"),
        judge=_compbench,
    ),
    Metric(
        name="lpips",
        about="against the teacher's image of the same seed",
        numbers={"lpips": plain("Perceptual distance to the teacher's image of the same seed: 0 if they are equal.", "LPIPS", form=".3f")},
        part=LpipsPart,
        weights=("weights",),
        judge=_lpips,
        against_teacher=True,
    ),
)
PROBE_RECORDS = (
    Probe(
        name="cost",
        about="Memory and time",
        numbers={
            "weights": plain("Parameters of the encoder, CLIP-L included.", "parameters", "M", 1e-6),
            "resident bytes": plain("Memory of the weights as ComfyUI holds them, CLIP-L included.", "memory", "MB", 1e-6, ".1f"),
            "load s": plain("Time to load the encoder, with its file in the system's cache.", "load", "s"),
            "encode s": plain("Time to encode a prompt, with the encoder on its device.", "encode", "ms", 1e3, ".1f"),
            "prompt change s": plain("Wait between Run and the first step of the next image.", "prompt change", "ms", 1e3, ".1f"),
        },
        part=CostPart,
        by_machine=True,
    ),
    Probe(
        name="collapse",
        about="Collapse: mean distance of pooled embeddings, and their effective rank",
        numbers={
            "pooled distance": plain("Mean distance of two prompts' mean embeddings: near 0 after a collapse.", form=".3g"),
            "effective rank": plain("How many directions the prompts' mean embeddings fill: few after a collapse.", form=".3g"),
        },
        part=EmbeddingPart,
        table="embedding",
        least=2,
        keeps_vectors=True,
    ),
    Probe(
        name="velocity_gap",
        about="Velocity gap to the teacher by noise level",
        numbers={"sigma": plain("Mean squared difference to the velocity under the teacher's text, in this band of noise.", form=".3g")},
        part=VelocityGapPart,
        against_teacher=True,
        images=2.0,
    ),
    Probe(
        name="latent_distance",
        about="Distance of the latents from the teacher's (root mean square)",
        numbers={"after step": plain("Root mean square of the difference to the teacher's latent of the same seed.", form=".3g")},
        part=LatentDistancePart,
        against_teacher=True,
        images=2.0,
    ),
)
METRICS = {metric.name: metric for metric in METRIC_RECORDS}
PROBES = {probe.name: probe for probe in PROBE_RECORDS}
RECORDS: tuple[Record, ...] = (*METRIC_RECORDS, *PROBE_RECORDS)
NUMBERS = {name: number for record in RECORDS for name, number in record.numbers.items()}


def number_of(name: str) -> Number:
    """The record of a number; a name may say more than the record's, as in "FID (other Inception)"."""
    number = next(number for known, number in NUMBERS.items() if name.startswith(known))
    return number if number.label else replace(number, label=name)
