"""The suite of an evaluation: typed, documented field by field, refused as a whole if any of it is not understood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..config.files import load_config
from ..config.parts import FROM_LIST, NOT_EMPTY, Config, Count, FilePath, FileStem, OptionalPath, Part, Text
from ..prompts.corpora import COMPBENCH_CATEGORIES

SHIPPED = Path(__file__).resolve().parent / "suites"
# Kinds of prompts that come from a file or folder, and those that are made here.
FROM_FILES = ("lines", "compbench", "coco")
# Metrics of pictures that need a part of their own, by the part's name.
PART_OF_METRIC = {"ocr": "ocr", "clip_score": "clip_score", "fid": "fid", "compbench": "compbench", "lpips": "lpips"}
MetricName = Literal["ocr", "readback", "clip_score", "fid", "compbench", "lpips"]


class EncoderPart(Part):
    """The text encoder that the others are compared with, and the CLIP-L beside all of them."""

    t5: FilePath = Field(description="T5-XXL (bf16, fp16, fp8) or an encoder of ours: a file in models/text_encoders, or a path")
    clip_l: FilePath = Field(description='CLIP-L for the pooled vector: a file in models/text_encoders, a path, or "none" for zeros')


class DiffusionModelPart(Part):
    """The diffusion model and the VAE that paint for all encoders."""

    file: FilePath = Field(description="a file in models/diffusion_models, or a path")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8_e4m3fn"] = Field(
        description="how its weights are held in memory; auto: as in the file"
    )
    vae: FilePath = Field(description="a file in models/vae, or a path")


class SamplingPart(Part):
    """How pictures are painted: euler, scheduler simple, cfg 1, as the example workflows do it."""

    resolution_px: int = Field(ge=16, multiple_of=16, description="side of the square pictures, pixels, a multiple of 16")
    steps: Count = Field(description="denoising steps")
    guidance: float | None = Field(default=None, ge=0, description="Flux's guidance; left out for models without (schnell)")
    batch: Count = Field(description="pictures that go through the diffusion model at once on one GPU: bounds the memory")


class Prompts(Part):
    """Where a task's prompts come from."""

    kind: Literal["common_text", "lines", "compbench", "coco", "miniature"] = Field(
        description="common_text: made here, those held out of training; compbench: the validation files of a T2I-CompBench folder; coco: "
        "an annotation file of COCO captions; miniature: held-out scenes of the miniature; lines: a text file, a prompt per line"
    )
    path: OptionalPath = Field(default="", description="file, or folder of compbench; relative to the folder the command is started in")
    category: str = Field(default="", description="category of compbench, or task of the miniature")
    pictures: OptionalPath = Field(default="", description="coco: folder of the photographs, which FID compares with")
    limit: Count = Field(description="prompts used, from the first; fewer if there are not so many")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Prompts:
        if (self.kind in FROM_FILES) != bool(self.path):
            raise ValueError(
                f"prompts of kind {self.kind} {'need a path' if self.kind in FROM_FILES else 'are made here: expected no path'}"
            )
        if self.pictures and self.kind != "coco":
            raise ValueError(f"prompts of kind {self.kind} have no photographs: expected no pictures")
        self._check_category()
        return self

    def _check_category(self) -> None:
        known = {"compbench": COMPBENCH_CATEGORIES, "miniature": _miniature_tasks()}.get(self.kind, ())
        if self.category not in (known or ("",)):
            expected = f"expected a category, one of {', '.join(known)}" if known else "expected no category"
            raise ValueError(f"prompts of kind {self.kind}: {expected}, found {self.category or 'none'}")


def _miniature_tasks() -> tuple[str, ...]:
    from ..world.scenes import NEW_IN_TASK  # brings numpy, which importing this module need not

    return tuple(NEW_IN_TASK)


class Task(Part):
    """Prompts, and what their pictures are asked for."""

    name: FileStem = Field(description="what tables call it")
    prompts: Prompts = Field(description="where its prompts come from")
    metrics: Annotated[tuple[MetricName, ...], FROM_LIST, NOT_EMPTY] = Field(
        description="ocr: the text that is asked for is read; readback: the miniature's exact reader; clip_score: picture and prompt; fid: "
        "against the photographs; compbench: as its category; lpips: against the teacher's picture of the same seed"
    )

    @model_validator(mode="after")
    def _metrics_fit_the_prompts(self) -> Task:
        kind = self.prompts.kind
        wanted = {
            "ocr": kind == "common_text" or (kind == "miniature" and "word" in self.prompts.category),
            "readback": kind == "miniature",
            "compbench": kind == "compbench",
            "fid": bool(self.prompts.pictures),
        }
        for metric in self.metrics:
            if not wanted.get(metric, True):
                raise ValueError(
                    f"task {self.name}: metric {metric} has nothing to go by in prompts of kind {kind} {self.prompts.category}".rstrip()
                )
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"task {self.name} has a metric twice: {', '.join(self.metrics)}")
        return self


class OcrPart(Part):
    """What reads the text in pictures."""

    reader: Literal["easyocr", "tesseract"] = Field(description="easyocr, as in the paper, or the system's tesseract")
    weights: OptionalPath = Field(default="", description='folder of its weights; "" for its own')
    languages: Annotated[tuple[Text, ...], FROM_LIST, NOT_EMPTY] = Field(description="languages it reads, by EasyOCR's codes")


class WeightsPart(Part):
    """A network that judges pictures, from this machine; nothing is downloaded."""

    weights: FilePath = Field(description="clip_score: a Hugging Face folder of CLIP; fid: a file of Inception; lpips: a file of AlexNet")


class CompbenchPart(Part):
    """The networks that judge T2I-CompBench."""

    vqa: FilePath = Field(description="folder of BLIP-VQA (colour, shape, texture)")
    detector: FilePath = Field(description="folder of the object detector (2D and 3D position, count)")
    depth: OptionalPath = Field(default="", description='folder of the depth estimator (3D position); "" if no task asks for it')


class EmbeddingPart(Part):
    """Collapse: how far apart an encoder keeps prompts."""

    prompts: int = Field(ge=3, description="prompts encoded, of all tasks in turn")
    map: bool = Field(description="draw the t-SNE map of teacher and student (needs scikit-learn and matplotlib)")


class VelocityGapPart(Part):
    """The trainer's own held-out loss, on the suite's prompts, along the teacher's trajectories."""

    prompts: int = Field(ge=2, description="prompts measured, of all tasks in turn")
    sigma_bands: Count = Field(description="bands of equal width, of noise levels from 0 to 1, in which the gap is reported")


class LatentDistancePart(Part):
    """How far the student's latent is from the teacher's of the same seed, after each denoising step."""

    prompts: int = Field(ge=2, description="prompts measured, of all tasks in turn")


class CostPart(Part):
    """Memory and time of each encoder."""

    repeats: int = Field(ge=2, description="times that each is measured")


class PagePart(Part):
    """The page of pictures."""

    pictures: Count = Field(description="prompts shown of each task: those on which a student loses most make up half of them")
    side_px: Count = Field(description="side to which larger pictures are scaled down")


class Suite(Config):
    """All that decides what is painted and how it is judged."""

    name: FileStem = Field(description="name of the suite")
    seed: int = Field(ge=0, lt=2**31, description="picture k of a task is painted from seed + k, by every encoder")
    teacher: EncoderPart = Field(description="the text encoder that the others are compared with")
    students: Annotated[tuple[FilePath, ...], FROM_LIST] = Field(
        description="encoders compared with it, besides those of --student: distilled ones or T5-XXL in another format"
    )
    diffusion_model: DiffusionModelPart = Field(description="what paints")
    sampling: SamplingPart = Field(description="how pictures are painted")
    ocr: OcrPart | None = Field(default=None, description="for the metric ocr")
    clip_score: WeightsPart | None = Field(default=None, description="for the metric clip_score")
    fid: WeightsPart | None = Field(default=None, description="for the metric fid")
    lpips: WeightsPart | None = Field(default=None, description="for the metric lpips")
    compbench: CompbenchPart | None = Field(default=None, description="for the metric compbench")
    embedding: EmbeddingPart | None = Field(default=None, description="collapse of the embeddings")
    velocity_gap: VelocityGapPart | None = Field(default=None, description="the velocity gap by noise level")
    latent_distance: LatentDistancePart | None = Field(default=None, description="distance of the latents, step by step")
    cost: CostPart | None = Field(default=None, description="memory and time")
    page: PagePart = Field(description="the page of pictures")
    tasks: Annotated[tuple[Task, ...], FROM_LIST, NOT_EMPTY] = Field(alias="task", description="what is painted, in order")

    @model_validator(mode="after")
    def _parts_are_there(self) -> Suite:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"two tasks have one name: found {', '.join(names)}")
        for task in self.tasks:
            for metric in task.metrics:
                part = PART_OF_METRIC.get(metric)
                if part and getattr(self, part) is None:
                    raise ValueError(f"task {task.name} asks for {metric}, and there is no table [{part}]")
        return self


def load_suite(name_or_path: str, overrides: Sequence[str] = ()) -> Suite:
    """The suite in that file, or the shipped one of that name, with `part.key=value` and `task.0.prompts.limit=5` settings applied.

    Raises ConfigError that lists every problem: an unknown key with the nearest known one, a wrong value with what was expected.
    """
    return load_config(name_or_path, overrides, Suite, "suite", SHIPPED)
