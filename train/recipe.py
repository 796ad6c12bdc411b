"""The recipe of a run: every key typed, documented and validated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, WrapValidator, model_serializer, model_validator

from ..config.files import ConfigError, load_config
from ..config.parts import FROM_LIST, NOT_EMPTY, Config, Count, FilePath, FileStem, OptionalPath, Part, Text
from ..families import FAMILIES
from ..families.family import Family
from ..prompts.corpora import Corpus
from ..runtime.comfyui import NO_FILE
from ..students import KINDS
from ..students.kind import Layout, StudentKind
from .objectives import OBJECTIVES
from .recipe_checks import check_recipe
from .recipe_student import StudentPart, one_of, one_or_several
from .recipe_values import leaves, without_folders

# Values in the place of a file.
STAND_IN, RANDOM = "stand-in", "random"

ObjectiveName = Annotated[str, AfterValidator(lambda name: one_of(name, OBJECTIVES))]
FamilyName = Annotated[str, AfterValidator(lambda name: one_of(name, FAMILIES))]
TokenLength = Annotated[int, Field(ge=2, le=4096)]
Guidance = Annotated[float, Field(ge=0)]
Cfg = Annotated[float, Field(ge=1)]


class TeacherPart(Part):
    """The text encoder that the student imitates."""

    t5: FilePath = Field(
        description='the large encoder (T5-XXL, Qwen3-4B) or a distilled one: a file in models/text_encoders, a path, or "stand-in"'
    )
    clip_l: FilePath = Field(description='CLIP-L: a file in models/text_encoders, a path, or "none"')
    clip_g: FilePath = Field(default=NO_FILE, description='CLIP-G, where the family has one: a file, as clip_l, or "none"')
    chunk_prompts: Count = Field(
        description="prompts that the teacher encodes at a time, rounded down to complete trajectories, at least one; each process keeps "
        "their embeddings in RAM: tokens x text width x 4 bytes per prompt, 4.2 MB at 256 tokens, 8.4 MB at 512; not with cache"
    )
    cache: OptionalPath = Field(
        default="",
        description="folder where the teacher's texts of all prompts are kept: encoded before the diffusion model is loaded, shared by "
        'runs; a run that finds all of its own there loads no teacher. "": encoded while the run trains, and not kept',
    )
    cache_format: Literal["bf16", "fp8"] = Field(
        default="bf16", description="number format of the cached texts: bf16, or fp8 (e4m3) with a scale per token, half the size"
    )

    @model_serializer(mode="wrap")
    def _without_later_keys(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without the keys has the digest that it had before they existed."""
        unused = {"clip_g": NO_FILE, "cache": ""} | ({} if self.cache else {"cache_format": self.cache_format})
        return {key: value for key, value in written(self).items() if key not in unused or value != unused[key]}

    @property
    def at_a_time(self) -> int:
        """Prompts whose texts are held in RAM, rounded down to complete trajectories, at least one."""
        return 1 if self.cache else self.chunk_prompts

    @property
    def companions(self) -> dict[str, str]:
        """The files of the companions that are given, by attribute of ComfyUI's text model."""
        return {name: file for name, file in (("clip_l", self.clip_l), ("clip_g", self.clip_g)) if file != NO_FILE}


class FrozenModelPart(Part):
    """The frozen diffusion model whose velocities are compared."""

    file: FilePath = Field(description='a file in models/diffusion_models, a path, or "stand-in"')
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8_e4m3fn"] = Field(
        description="number format of its weights in memory; auto: as in the file"
    )
    checkpoint_blocks: bool = Field(description="recompute each block in the backward pass instead of keeping its activations in memory")
    family: FamilyName = Field(description="family of the diffusion model; decides the width of the text embedding")


class OptimizerPart(Part):
    """AdamW, with or without Muon, and the learning rate schedule."""

    learning_rate: float = Field(gt=0, description="peak learning rate; it falls linearly to 0 at the last step")
    restart_per_stage: bool = Field(
        default=False, description="restart the learning rate schedule, warm-up included, and the optimizer's state at each stage"
    )
    muon_learning_rate: float = Field(
        default=0.0,
        ge=0,
        description="peak learning rate of Muon, for the matrices in the student's blocks, on the same schedule. 0: AdamW trains them too",
    )
    weight_decay: float = Field(ge=0, description="AdamW's decoupled weight decay, multiplied by the learning rate at each step")
    beta1: float = Field(ge=0, lt=1, description="decay per step of the running mean of gradients")
    beta2: float = Field(ge=0, lt=1, description="decay per step of the running mean of squared gradients")
    warmup_steps: int = Field(ge=0, description="optimizer steps over which the learning rate rises linearly from 0")
    max_gradient_norm: float = Field(gt=0, description="gradients with a larger L2 norm are scaled down to this norm")
    autocast: Literal["bf16", "none"] = Field(description="dtype of the student's computation; its weights stay float32")

    @model_serializer(mode="wrap")
    def _without_later_keys(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without the key has the digest that it had before the key existed."""
        return {key: value for key, value in written(self).items() if key != "restart_per_stage" or value}


class TrajectoryPart(Part):
    """The teacher's denoising trajectories."""

    steps: Count = Field(description="denoising steps T of a trajectory; each is one optimizer step")
    guidance: Annotated[tuple[Guidance, ...], FROM_LIST] = Field(
        description="guidance values, one drawn per sample; empty for models without guidance (schnell)"
    )
    token_lengths: Annotated[tuple[TokenLength, ...], FROM_LIST, NOT_EMPTY] = Field(
        description="prompt lengths in tokens, one drawn per batch: prompts are padded to it, or only cut where the family does not pad"
    )
    cfg: Annotated[tuple[Cfg, ...], FROM_LIST] = Field(
        default=(),
        description="weights of classifier-free guidance of the teacher's trajectories, one drawn per sample; empty: 1, without guidance",
    )
    negatives: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of training prompts replaced by empty and negative prompts; 0.1 with CFG"
    )

    @model_serializer(mode="wrap")
    def _without_later_keys(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without the keys has the digest that it had before they existed."""
        return {key: value for key, value in written(self).items() if key not in ("cfg", "negatives") or value}


class Stage(Part):
    """A part of the run with one mix of prompts, one resolution and one objective."""

    name: FileStem = Field(description="name of the stage in reports")
    corpora: Annotated[tuple[Corpus, ...], FROM_LIST, NOT_EMPTY] = Field(description="the mix of prompts")
    resolution_px: int = Field(
        ge=16, le=8192, multiple_of=16, description="side of the square images in pixels, a multiple of 16, at most 8192"
    )
    steps: Count = Field(description="optimizer steps")
    batch: Count = Field(description="prompts in one forward pass of the diffusion model on one GPU: decides the memory needed")
    accumulate: Count = Field(description="batches per optimizer step over all GPUs: a step sees batch x accumulate prompts")
    objective: ObjectiveName = Field(
        description="what is compared. velocity: the teacher's steps (Eq. 5); early, text_stream: the first `blocks` blocks; keys_values, "
        "projected: the text in the first block and before it; embedding (Eq. 4), scaled, whitened, whitened_cosine: the embeddings"
    )
    blocks: int = Field(default=0, ge=0, description="early, text_stream: how many blocks of the diffusion model; 0 for other objectives")
    trajectory_steps: int = Field(
        default=0,
        ge=0,
        description="denoising steps of a trajectory in this stage; 0: as sampling.steps. 1: new prompts at every step, for objectives "
        "that follow no trajectory",
    )

    @model_serializer(mode="wrap")
    def _without_later_keys(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without the keys has the digest that it had before they existed."""
        return {key: value for key, value in written(self).items() if key not in ("blocks", "trajectory_steps") or value}

    @model_validator(mode="after")
    def _check_blocks(self) -> Stage:
        takes = [name for name, objective in OBJECTIVES.items() if objective.takes_blocks]
        if self.objective in takes and not self.blocks:
            raise ValueError(f"blocks: expected 1 or more for the objective {self.objective}, got 0")
        if self.blocks and self.objective not in takes:
            raise ValueError(f"blocks: expected none for the objective {self.objective}, got {self.blocks}; {' and '.join(takes)} take it")
        return self

    @property
    def what(self) -> str:
        """Its objective, with the number of blocks where it takes one: `early (2)`."""
        return f"{self.objective} ({self.blocks})" if self.blocks else self.objective

    def batches_per_rank(self, ranks: int) -> int:
        """Batches per optimizer step of each of `ranks` processes. Raises ConfigError if they cannot be divided evenly."""
        if self.accumulate % ranks:
            raise ConfigError(
                f"Stage {self.name}: {self.accumulate} batches per optimizer step cannot be divided evenly among {ranks} GPUs.",
                f"set accumulate to a multiple of {ranks} (and batch so that batch x accumulate stays {self.batch * self.accumulate}).",
            )
        return self.accumulate // ranks


class ValidationPart(Part):
    """The held-out loss."""

    prompts: Count = Field(
        description="prompts held out of training for validation; the teacher encodes them once and their embeddings stay in RAM"
    )
    every_steps: Count = Field(description="optimizer steps between validations")
    sigma_bands: Count = Field(description="bands of equal width between noise levels 0 and 1; the loss is reported for each")


class CheckpointsPart(Part):
    """Checkpoints of the run."""

    every_steps: Count = Field(description="optimizer steps between checkpoints")
    keep_last: Count = Field(description="newest checkpoints that are kept; the best one is always kept")


class PreviewPart(Part):
    """Images of teacher, student and their difference while training.

    Made at the last stage's resolution, at 256 tokens and guidance 3.5 if the student is trained with them, else at the longest length
    and the middle guidance that it is trained with. The main process makes them while the others wait, at most ranks.TIMEOUT_S.
    """

    every_steps: Count = Field(description="optimizer steps between previews")
    prompts: Annotated[tuple[Text, ...], FROM_LIST, NOT_EMPTY] = Field(
        description="prompts of the images, always with the same seeds; each is sampled twice"
    )
    vae: OptionalPath = Field(description='a file in models/vae, or a path; "" for no previews')


class ReportPart(Part):
    """What a run also reports to. Does not decide the result."""

    wandb: bool = Field(default=False, description="send numbers and images to Weights & Biases too (the package wandb)")


class OutputPart(Part):
    """The trained encoder."""

    name: FileStem = Field(description="the encoder becomes models/text_encoders/<name>.safetensors")
    also_serves: Annotated[tuple[FamilyName, ...], FROM_LIST] = Field(
        default=(),
        description="other families of diffusion models for which the loader takes the encoder, of those with the same teacher and padding",
    )

    @model_serializer(mode="wrap")
    def _without_later_keys(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe without the key has the digest that it had before the key existed."""
        return {key: value for key, value in written(self).items() if key != "also_serves" or value}


class Recipe(Config):
    """Everything that decides the result of a run."""

    name: FileStem = Field(description="name of the recipe")
    seed: int = Field(ge=0, lt=2**31, description="seed of every random draw")
    teacher: TeacherPart = Field(description="the text encoder that the student imitates")
    diffusion_model: FrozenModelPart = Field(description="the frozen diffusion model")
    students: Annotated[tuple[StudentPart, ...], NOT_EMPTY, WrapValidator(one_or_several)] = Field(
        alias="student", description="the text encoder that is trained, or several"
    )
    optimizer: OptimizerPart = Field(description="AdamW and its schedule")
    sampling: TrajectoryPart = Field(description="the teacher's denoising trajectories")
    validation: ValidationPart = Field(description="the held-out loss")
    checkpoints: CheckpointsPart = Field(description="checkpoints of the run")
    preview: PreviewPart = Field(description="images while training")
    report: ReportPart = Field(default=ReportPart(), description="what the run also reports to")
    output: OutputPart = Field(description="the trained encoder")
    stages: Annotated[tuple[Stage, ...], FROM_LIST, NOT_EMPTY] = Field(alias="stage", description="the stages of the run, in order")

    @model_serializer(mode="wrap")
    def _as_before(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe with one student that reports to nothing else has the text that it had before there could be several, and `report`."""
        values = {key: value for key, value in written(self).items() if key != "report" or self.report != ReportPart()}
        return values if len(self.students) > 1 else values | {"student": values["student"][0]}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        check_recipe(self)
        return self

    @property
    def student_names(self) -> list[str]:
        """The names of its students, each of which has a run of its own in that of the recipe; "" for one without a name."""
        return [student.name or "" for student in self.students]

    @property
    def student_keys(self) -> list[str]:
        """The key of each student: `student`, or of several `student.0` and so on."""
        return [f"student.{number}" for number in range(len(self.students))] if len(self.students) > 1 else ["student"]

    @property
    def each(self) -> tuple[Recipe, ...]:
        """For each student the recipe that trains it alone, to the same bits."""
        return tuple(map(self._alone, self.students)) if any(self.student_names) else (self,)

    def _alone(self, student: StudentPart) -> Recipe:
        output = self.output.model_copy(update={"name": f"{self.output.name}-{student.name}"})
        alone = {"name": f"{self.name}-{student.name}", "output": output, "students": (student.model_copy(update={"name": None}),)}
        return self._without_report().model_copy(update=alone)

    @property
    def student(self) -> StudentPart:
        """The student of a recipe with one; see `each`."""
        assert len(self.students) == 1, "the recipes of `each` have one"
        return self.students[0]

    def trajectory_steps(self, stage: Stage) -> int:
        """Denoising steps of a trajectory in a stage."""
        return stage.trajectory_steps or self.sampling.steps

    @property
    def needs_diffusion_model(self) -> bool:
        """Whether the run needs more of the diffusion model than its text projection: for a stage, or for previews."""
        return bool(self.preview.vae) or any(OBJECTIVES[stage.objective].needs_model for stage in self.stages)

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical text without `report`, which does not decide the result."""
        return super(Recipe, self._without_report()).sha256

    def without_folders(self) -> Recipe:
        """A copy to be published, in which absolute paths are cut to their file names."""
        return Recipe.model_validate(without_folders(self.model_dump(by_alias=True, exclude_none=True)))

    def with_cache(self, folder: str) -> Recipe:
        """A copy with its teacher's texts in another folder; "": the teacher encodes while the run trains."""
        return self.model_copy(update={"teacher": self.teacher.model_copy(update={"cache": folder})})

    def _without_report(self) -> Recipe:
        return self.model_copy(update={"report": ReportPart()})

    @property
    def periods(self) -> tuple[int, ...]:
        """The steps of each period over which the learning rate rises and falls: the run, or every stage."""
        steps = tuple(stage.steps for stage in self.stages)
        return steps if self.optimizer.restart_per_stage else (sum(steps),)

    @property
    def family(self) -> Family:
        """The family of its diffusion model."""
        return FAMILIES[self.diffusion_model.family]

    @property
    def student_kind(self) -> StudentKind:
        """The kind of its student: of those that can serve the family, the first that has the size or the table."""
        return next(KINDS[name] for name in self.family.students if self.student.is_of(KINDS[name]))

    def student_layout(self, output_width: int) -> Layout:
        """The student's layout for a diffusion model whose text input is `output_width` channels wide."""
        part = self.student
        return self.student_kind.planned(part.size or part.layout or "", part.projection_width, output_width)

    def differences(self, other: Recipe) -> list[str]:
        """What differs in `other` besides `report`, one line per key (`seed: 0 -> 1`); of recipes with other students, only their names."""
        dumped = [recipe._without_report().model_dump(by_alias=True, exclude_none=True) for recipe in (self, other)]
        if self.student_names != other.student_names:
            dumped = [values | {"student": recipe.student_names} for values, recipe in zip(dumped, (self, other), strict=True)]
        mine, theirs = (dict(leaves(values)) for values in dumped)
        changed = (path for path in mine | theirs if mine.get(path) != theirs.get(path))
        return [f"{path}: {mine.get(path, 'not set')} -> {theirs.get(path, 'not set')}" for path in changed]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in that file, or the shipped one of that name, with `part.key=value` and `stage.0.steps=5` settings applied.

    Raises ConfigError that lists every problem: an unknown key with the nearest known one, a wrong value with what was expected.
    """
    return load_config(name_or_path, overrides, Recipe)
