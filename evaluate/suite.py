"""The suite of an evaluation: every key typed, documented and validated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..config.files import load_config
from ..config.parts import FROM_LIST, NOT_EMPTY, Config, Count, FilePath, FileStem, OptionalPath, Part, Text
from ..prompts.corpora import COMPBENCH_CATEGORIES

SHIPPED = Path(__file__).resolve().parent / "suites"
# Kinds of prompts that come from a file or folder; the others are generated.
FROM_FILES = ("lines", "compbench", "coco")
# The table of the suite that a metric needs.
PART_OF_METRIC = {"ocr": "ocr", "clip_score": "clip_score", "fid": "fid", "compbench": "compbench", "lpips": "lpips"}
MetricName = Literal["ocr", "readback", "clip_score", "fid", "compbench", "lpips"]


class EncoderPart(Part):
    """The text encoder that the others are compared with, and the CLIP-L of all of them."""

    t5: FilePath = Field(description="T5-XXL (bf16, fp16, fp8) or a distilled T5: a file in models/text_encoders, or a path")
    clip_l: FilePath = Field(description='CLIP-L for the pooled vector: a file in models/text_encoders, a path, or "none" for zeros')


class DiffusionModelPart(Part):
    """The diffusion model and the VAE of all images."""

    file: FilePath = Field(description="a file in models/diffusion_models, or a path")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8_e4m3fn"] = Field(
        description="how its weights are held in memory; auto: as in the file"
    )
    vae: FilePath = Field(description="a file in models/vae, or a path")


class SamplingPart(Part):
    """How images are sampled: euler, scheduler simple, CFG 1, as in the example workflows."""

    resolution_px: int = Field(ge=16, multiple_of=16, description="side of the square images in pixels, a multiple of 16")
    steps: Count = Field(description="denoising steps")
    guidance: float | None = Field(default=None, ge=0, description="Flux's guidance; left out for models without guidance (schnell)")
    batch: Count = Field(description="images in one forward pass of the diffusion model on one GPU: decides the memory needed")


class Prompts(Part):
    """The prompts of a task."""

    kind: Literal["common_text", "lines", "compbench", "coco", "miniature"] = Field(
        description="common_text: generated, held out of training; compbench: the validation files of a T2I-CompBench folder; coco: "
        "an annotation file of COCO captions; miniature: held-out scenes of the miniature; lines: a text file, one prompt per line"
    )
    path: OptionalPath = Field(default="", description="file, or folder of compbench; relative to the working folder or to the pack's")
    category: str = Field(default="", description="category of compbench, or task of the miniature")
    pictures: OptionalPath = Field(default="", description="coco: folder of the photographs, the reference of FID")
    limit: Count = Field(description="prompts used at most, from the first")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Prompts:
        if (self.kind in FROM_FILES) != bool(self.path):
            raise ValueError(
                f"prompts of kind {self.kind} {'need a path' if self.kind in FROM_FILES else 'are generated: expected no path'}"
            )
        if self.pictures and self.kind != "coco":
            raise ValueError(f"prompts of kind {self.kind} have no photographs: expected no pictures")
        self._check_category()
        return self

    def _check_category(self) -> None:
        known = {"compbench": COMPBENCH_CATEGORIES, "miniature": _miniature_tasks()}.get(self.kind, ())
        if self.category not in (known or ("",)):
            expected = f"expected a category, one of {', '.join(known)}" if known else "expected no category"
            raise ValueError(f"prompts of kind {self.kind}: {expected}, got {self.category or 'none'}")


def _miniature_tasks() -> tuple[str, ...]:
    from ..world.scenes import NEW_IN_TASK  # imports numpy, which importing this module must not

    return tuple(NEW_IN_TASK)


class Task(Part):
    """Prompts, and the metrics of their images."""

    name: FileStem = Field(description="name of the task in tables")
    prompts: Prompts = Field(description="where its prompts come from")
    metrics: Annotated[tuple[MetricName, ...], FROM_LIST, NOT_EMPTY] = Field(
        description="ocr: the requested text is read; readback: the miniature's exact reader; clip_score: image and prompt; fid: against "
        "the photographs; compbench: as its category; lpips: against the teacher's image of the same seed"
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
                    f"task {self.name}: metric {metric} does not apply to prompts of kind {kind} {self.prompts.category}".rstrip()
                )
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"task {self.name}: expected different metrics, got {', '.join(self.metrics)}")
        return self


class OcrPart(Part):
    """The reader of text in images."""

    reader: Literal["easyocr", "tesseract"] = Field(description="easyocr, as in the paper, or tesseract")
    weights: OptionalPath = Field(default="", description='folder of its weights; "" for its default')
    languages: Annotated[tuple[Text, ...], FROM_LIST, NOT_EMPTY] = Field(description="languages as EasyOCR's codes")


class WeightsPart(Part):
    """A network that scores images; its weights are local, nothing is downloaded."""

    weights: FilePath = Field(description="clip_score: a Hugging Face folder of CLIP; fid: Inception's file; lpips: AlexNet's file")


class CompbenchPart(Part):
    """The networks that score T2I-CompBench."""

    vqa: FilePath = Field(description="folder of BLIP-VQA (colour, shape, texture)")
    detector: FilePath = Field(description="folder of the object detector (2D and 3D position, count)")
    depth: OptionalPath = Field(default="", description='folder of the depth estimator (3D position); "" if no task asks for it')


class EmbeddingPart(Part):
    """Collapse: the distances between the embeddings of different prompts."""

    prompts: int = Field(ge=3, description="prompts encoded, from all tasks in turn")
    map: bool = Field(description="draw the t-SNE map of teacher and student (needs scikit-learn and matplotlib)")


class VelocityGapPart(Part):
    """The trainer's held-out loss, on the suite's prompts, along the teacher's trajectories."""

    prompts: int = Field(ge=2, description="prompts measured, from all tasks in turn")
    sigma_bands: Count = Field(description="bands of equal width between noise levels 0 and 1; the gap is reported for each")


class LatentDistancePart(Part):
    """The distance of the student's latent from the teacher's of the same seed, after each denoising step."""

    prompts: int = Field(ge=2, description="prompts measured, from all tasks in turn")


class CostPart(Part):
    """Memory and time of each encoder."""

    repeats: int = Field(ge=2, description="measurements of each")


class PagePart(Part):
    """The page of images."""

    pictures: Count = Field(description="prompts shown of each task: half of them those on which a student loses most")
    side_px: Count = Field(description="side in pixels to which larger images are scaled down")


class Suite(Config):
    """Everything that decides the images and their scores."""

    name: FileStem = Field(description="name of the suite")
    seed: int = Field(ge=0, lt=2**31, description="image k of a task is sampled from seed + k, for every encoder")
    teacher: EncoderPart = Field(description="the text encoder that the others are compared with")
    students: Annotated[tuple[FilePath, ...], FROM_LIST] = Field(
        description="encoders compared with it, in addition to --student: distilled T5s or T5-XXL in another format"
    )
    diffusion_model: DiffusionModelPart = Field(description="the diffusion model and the VAE")
    sampling: SamplingPart = Field(description="how images are sampled")
    ocr: OcrPart | None = Field(default=None, description="for the metric ocr")
    clip_score: WeightsPart | None = Field(default=None, description="for the metric clip_score")
    fid: WeightsPart | None = Field(default=None, description="for the metric fid")
    lpips: WeightsPart | None = Field(default=None, description="for the metric lpips")
    compbench: CompbenchPart | None = Field(default=None, description="for the metric compbench")
    embedding: EmbeddingPart | None = Field(default=None, description="collapse of the embeddings")
    velocity_gap: VelocityGapPart | None = Field(default=None, description="the velocity gap by noise level")
    latent_distance: LatentDistancePart | None = Field(default=None, description="distance of the latents after each step")
    cost: CostPart | None = Field(default=None, description="memory and time")
    page: PagePart = Field(description="the page of images")
    tasks: Annotated[tuple[Task, ...], FROM_LIST, NOT_EMPTY] = Field(alias="task", description="the tasks, in order")

    @model_validator(mode="after")
    def _parts_are_there(self) -> Suite:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"expected a different name for every task, got {', '.join(names)}")
        for task in self.tasks:
            for metric in task.metrics:
                part = PART_OF_METRIC.get(metric)
                if part and getattr(self, part) is None:
                    raise ValueError(f"task {task.name}: metric {metric} needs the table [{part}]")
        return self


def load_suite(name_or_path: str, overrides: Sequence[str] = ()) -> Suite:
    """The suite in that file, or the shipped one of that name, with `part.key=value` and `task.0.prompts.limit=5` settings applied.

    Raises ConfigError that lists every problem: an unknown key with the nearest known one, a wrong value with what was expected.
    """
    return load_config(name_or_path, overrides, Suite, "suite", SHIPPED)
