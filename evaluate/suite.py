"""The suite of an evaluation: every key typed, documented and validated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, model_validator

from ..config.files import ConfigError, load_config
from ..config.parts import FROM_LIST, NOT_EMPTY, Config, Count, FilePath, FileStem, Part, Text
from ..families import DEFAULT, FAMILIES
from ..runtime.comfyui import NO_FILE
from .metrics import METRICS, PROBES, RECORDS, Record
from .questions import Prompts

SHIPPED = Path(__file__).resolve().parent / "suites"


def _known_metrics(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in METRICS:
            raise ValueError(f"expected metrics out of {', '.join(METRICS)}; got {name}")
    return names


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"expected one of {', '.join(FAMILIES)}")
    return name


class EncoderPart(Part):
    """The text encoder that the others are compared with, and the CLIP-L of all of them."""

    t5: FilePath = Field(description="T5-XXL (bf16, fp16, fp8) or a distilled T5: a file in models/text_encoders, or a path")
    clip_l: FilePath = Field(description='CLIP-L for the pooled vector: a file in models/text_encoders, a path, or "none" for zeros')
    clip_g: FilePath = Field(default=NO_FILE, description='CLIP-G, where the family has one: a file, as clip_l, or "none"')

    @property
    def companions(self) -> dict[str, str]:
        """The files of the companions that are given, by attribute of ComfyUI's text model."""
        return {name: file for name, file in (("clip_l", self.clip_l), ("clip_g", self.clip_g)) if file != NO_FILE}


class SuiteModelPart(Part):
    """The diffusion model and the VAE of all images."""

    family: Annotated[Text, AfterValidator(_known_family)] = Field(default=DEFAULT.name, description="family of the diffusion model")
    file: FilePath = Field(description="a file in models/diffusion_models, or a path")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8_e4m3fn"] = Field(
        description="how its weights are held in memory; auto: as in the file"
    )
    vae: FilePath = Field(description="a file in models/vae, or a path")


class SuiteSamplingPart(Part):
    """How images are sampled: euler, scheduler simple, as in the example workflows."""

    resolution_px: int = Field(ge=16, multiple_of=16, description="side of the square images in pixels, a multiple of 16")
    steps: Count = Field(description="denoising steps")
    guidance: float | None = Field(
        default=None, ge=0, description="guidance of models that have an input for it; left out for others (schnell)"
    )
    batch: Count = Field(description="images in one forward pass of the diffusion model on one GPU: decides the memory needed")
    cfg: float = Field(default=1.0, ge=1, description="weight of classifier-free guidance; 1: none")
    negative: str = Field(default="", description="negative prompt, used with a cfg beyond 1")

    @property
    def negative_prompt(self) -> str | None:
        """The negative prompt; None without classifier-free guidance."""
        return self.negative if self.cfg > 1 else None

    def __str__(self) -> str:
        guided = "without guidance" if self.guidance is None else f"guidance {self.guidance:g}"
        cfg = "" if self.cfg == 1 else f"CFG {self.cfg:g} with negative prompt {self.negative!r}, "
        return f"euler simple, {self.steps} steps, {guided}, {cfg}{self.resolution_px} px"


class Task(Part):
    """Prompts, and the metrics of their images."""

    name: FileStem = Field(description="name of the task in tables")
    prompts: Prompts = Field(description="where its prompts come from")
    metrics: Annotated[tuple[str, ...], FROM_LIST, NOT_EMPTY, AfterValidator(_known_metrics)] = Field(
        description="; ".join(f"{metric.name}: {metric.about}" for metric in METRICS.values())
    )

    @model_validator(mode="after")
    def _metrics_fit_the_prompts(self) -> Task:
        for metric in self.metrics:
            if not METRICS[metric].fits(self.prompts):
                prompts = f"prompts of kind {self.prompts.kind} {self.prompts.category}".rstrip()
                raise ValueError(f"task {self.name}: metric {metric} does not apply to {prompts}")
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"task {self.name}: expected different metrics, got {', '.join(self.metrics)}")
        return self


class PagePart(Part):
    """The page of images."""

    prompts: Count = Field(description="prompts shown of each task: half of them those on which a student loses most")
    side_px: Count = Field(description="side in pixels to which larger images are scaled down")


class _Models(Config):
    """What decides the images."""

    name: FileStem = Field(description="name of the suite")
    seed: int = Field(ge=0, lt=2**31, description="image k of a task is sampled from seed + k, for every encoder")
    teacher: EncoderPart = Field(description="the text encoder that the others are compared with")
    students: Annotated[tuple[FilePath, ...], FROM_LIST] = Field(
        description="encoders compared with it, in addition to --student: distilled T5s or T5-XXL in another format; FILE or NAME=FILE"
    )
    diffusion_model: SuiteModelPart = Field(description="the diffusion model and the VAE")
    sampling: SuiteSamplingPart = Field(description="how images are sampled")


# A table for each record that has settings, in their order.
_TABLES: dict[str, Any] = {
    record.table_name: (record.part | None, Field(default=None, description=record.about)) for record in RECORDS if record.part
}
_Tables = create_model("_Tables", __base__=_Models, **_TABLES)


class Suite(_Tables):
    """Everything that decides the images and their scores."""

    page: PagePart = Field(description="the page of images")
    tasks: Annotated[tuple[Task, ...], FROM_LIST, NOT_EMPTY] = Field(alias="task", description="the tasks, in order")

    @model_validator(mode="after")
    def _tables_are_there(self) -> Suite:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"expected a different name for every task, got {', '.join(names)}")
        family = FAMILIES[self.diffusion_model.family]
        family.check_side(self.sampling.resolution_px)
        for name in self.teacher.companions:
            if name not in family.companions:
                raise ValueError(f'teacher.{name}: expected "{NO_FILE}", as {family.display_name} takes none')
        for task in self.tasks:
            for metric in task.metrics:
                if METRICS[metric].part and self.table_of(METRICS[metric]) is None:
                    raise ValueError(f"task {task.name}: metric {metric} needs the table [{METRICS[metric].table_name}]")
        return self

    @property
    def draws_maps(self) -> bool:
        """Whether maps of the embeddings are drawn."""
        return any(probe.keeps_vectors and (part := self.table_of(probe)) is not None and part.map for probe in PROBES.values())

    def table_of(self, record: Record) -> Any:
        """The table with the settings of a metric or probe; None without."""
        return record.part and getattr(self, record.table_name)


def load_suite(name_or_path: str, overrides: Sequence[str] = (), limit: int | None = None) -> Suite:
    """The suite in that file, or the shipped one of that name, with `part.key=value` and `task.0.prompts.limit=5` settings applied.

    `limit`: of each task at most so many prompts. Raises ConfigError that lists every problem: an unknown key with the nearest known one,
    a wrong value with what was expected.
    """
    suite = load_config(name_or_path, overrides, Suite, "suite", SHIPPED)
    if limit is None:
        return suite
    if limit < 1:
        raise ConfigError(f"--limit is {limit}: expected at least 1.", "give the number of prompts to use of each task.")
    tasks = [
        task.model_copy(update={"prompts": task.prompts.model_copy(update={"limit": min(limit, task.prompts.limit)})})
        for task in suite.tasks
    ]
    return suite.model_copy(update={"tasks": tuple(tasks)})
