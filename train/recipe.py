"""The recipe of a run: typed, documented field by field, refused as a whole if any of it is not understood."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ..config.files import RecipeError, find_recipe, read_recipe
from ..config.parts import FROM_LIST, NOT_EMPTY, Count, FileStem, Part, Text
from ..config.toml import KeyPath, dotted, toml_value, write_toml
from ..families import FAMILIES
from ..families.family import Family
from ..students.t5.layout import StudentLayout


def _objective(name: str) -> str:
    from .objectives import OBJECTIVES  # brings torch, which importing this module shall not

    return _one_of(name, OBJECTIVES)


def _one_of(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ValueError(f"expected one of {', '.join(names)}")
    return name


FamilyName = Annotated[str, AfterValidator(lambda name: _one_of(name, FAMILIES))]
ObjectiveName = Annotated[str, AfterValidator(_objective)]
TokenLength = Annotated[int, Field(ge=2, le=4096)]
Guidance = Annotated[float, Field(ge=0)]


class TeacherPart(Part):
    """The text encoder that is imitated."""

    t5: Text = Field(description='T5-XXL or an encoder of ours: a file in models/text_encoders, a path, or "stand-in"')
    clip_l: Text = Field(description='CLIP-L for the pooled vector: a file in models/text_encoders, a path, or "none" for zeros')
    chunk_prompts: Count = Field(
        description="prompts that the teacher encodes in a row, of as many whole trajectories as they make up, at least one; each process "
        "holds their text in RAM: tokens x text width x 4 bytes a prompt, 4.2 MB at 256 tokens, 8.4 MB at 512"
    )


class DiffusionModelPart(Part):
    """The frozen diffusion model whose velocities are compared."""

    file: Text = Field(description='a file in models/diffusion_models, a path, or "stand-in"')
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8_e4m3fn"] = Field(
        description="how its weights are held in memory; auto: as in the file"
    )
    checkpoint_blocks: bool = Field(description="compute each block again in the backward pass instead of keeping its insides in memory")
    family: FamilyName = Field(description="kind of diffusion model; it decides the width of the text embedding")


class LayoutTable(Part):
    """A T5 encoder of any size."""

    d_model: Count = Field(description="width of the encoder, channels")
    d_ff: Count = Field(description="width of the feed-forward layers, channels")
    num_layers: Count = Field(description="blocks")
    num_heads: Count = Field(description="attention heads")
    d_kv: Count = Field(description="width of one attention head, channels")
    gated: bool = Field(description="gated GELU as in T5 v1.1 (true), or ReLU as in the first T5 (false)")


class StudentPart(Part):
    """The text encoder that is trained. Exactly one of `size` and `layout` is given."""

    size: Literal["small", "base", "large", "xl"] | None = Field(default=None, description="a size of T5 v1.1")
    layout: LayoutTable | None = Field(default=None, description="any other size")
    start: Text = Field(
        description="first weights: T5 v1.1 or flan-T5 (Hugging Face folder or .safetensors) or a distilled file, in models/text_encoders "
        'or by path; or "random"'
    )
    projection_width: Count = Field(description="hidden width of the projection from T5 to the diffusion model's text width, channels")
    dropout: float = Field(ge=0, lt=1, description="share of activations dropped in training, 0 to below 1")

    @model_validator(mode="after")
    def _one_size(self) -> StudentPart:
        if (self.size is None) == (self.layout is None):
            raise ValueError("expected either size or layout, found " + ("neither" if self.size is None else "both"))
        return self

    def student_layout(self, output_width: int) -> StudentLayout:
        """All sizes of the student, for a diffusion model whose text input is `output_width` channels wide."""
        encoder = StudentLayout(**self.layout.model_dump()) if self.layout else StudentLayout.named(self.size or "", None)
        return replace(encoder, hidden_width=self.projection_width, projected_width=output_width)


class OptimizerPart(Part):
    """AdamW, with or without Muon, and the learning rate over the run."""

    learning_rate: float = Field(gt=0, description="highest learning rate; it falls linearly to 0 at the last step")
    muon_learning_rate: float = Field(
        default=0.0,
        ge=0,
        description="Muon's highest, for the matrices inside the T5's blocks; it rises and falls as AdamW's. 0: AdamW moves them too",
    )
    weight_decay: float = Field(ge=0, description="AdamW's decoupled weight decay, per step and learning rate")
    beta1: float = Field(ge=0, lt=1, description="decay of the mean of gradients, per step")
    beta2: float = Field(ge=0, lt=1, description="decay of the mean of squared gradients, per step")
    warmup_steps: int = Field(ge=0, description="optimizer steps in which the learning rate rises linearly from 0")
    max_gradient_norm: float = Field(gt=0, description="the student's gradients are scaled down to this L2 norm")
    autocast: Literal["bf16", "none"] = Field(description="number format in which the student computes; its weights stay float32")


class SamplingPart(Part):
    """The teacher's denoising trajectories."""

    steps: Count = Field(description="denoising steps T of a trajectory; each of them is one optimizer step")
    guidance: Annotated[tuple[Guidance, ...], FROM_LIST] = Field(
        description="guidance values, one drawn per sample; empty for models without (schnell)"
    )
    token_lengths: Annotated[tuple[TokenLength, ...], FROM_LIST, NOT_EMPTY] = Field(
        description="padded prompt lengths, tokens, one drawn per batch"
    )


class Corpus(Part):
    """A source of prompts."""

    kind: Literal["common_text", "lines", "json", "csv", "parquet", "compbench"] = Field(
        description="common_text: made here; lines: a text file, a prompt per line; json: a list; compbench: a folder of T2I-CompBench"
    )
    path: str = Field(default="", description="file, or folder of compbench; relative to the folder the command is started in")
    column: str = Field(default="", description="column of csv and parquet, or key of a json list's objects, that holds the prompt")
    repeat: Count = Field(default=1, description="times that each of its prompts comes up in one round through the mix")
    limit: int = Field(default=0, ge=0, description="prompts used of it, from the first; 0 for all (common_text makes 50,000)")

    @model_validator(mode="after")
    def _path_and_column_fit_the_kind(self) -> Corpus:
        if (self.kind == "common_text") == bool(self.path):
            raise ValueError("common_text is made here: expected no path" if self.path else f"a corpus of kind {self.kind} needs a path")
        if self.kind in ("csv", "parquet") and not self.column:
            raise ValueError(f"a corpus of kind {self.kind} needs the column that holds the prompt")
        if self.kind not in ("csv", "parquet", "json") and self.column:
            raise ValueError(f"a corpus of kind {self.kind} has no columns: expected no column")
        return self


class Stage(Part):
    """A stretch of the run with one mix of prompts, one resolution and one objective."""

    name: FileStem = Field(description="what reports call it")
    corpora: Annotated[tuple[Corpus, ...], FROM_LIST, NOT_EMPTY] = Field(description="the mix of prompts")
    resolution_px: int = Field(ge=16, multiple_of=16, description="side of the square pictures, pixels, a multiple of 16")
    steps: Count = Field(description="optimizer steps")
    batch: Count = Field(description="prompts that go through the diffusion model at once on one GPU: bounds the memory")
    accumulate: Count = Field(description="batches per optimizer step, over all GPUs together: batch x accumulate prompts make a step")
    objective: ObjectiveName = Field(description="velocity: follow the teacher's steps (Eq. 5); embedding: the naive baseline (Eq. 4)")

    def batches_per_rank(self, ranks: int) -> int:
        """Batches that each of `ranks` processes does for one optimizer step. Raises RecipeError if they cannot be shared out evenly."""
        if self.accumulate % ranks:
            raise RecipeError(
                f"Stage {self.name}: {self.accumulate} batches per optimizer step cannot be shared out evenly among {ranks} GPUs.",
                f"set accumulate to a multiple of {ranks} (and batch so that batch x accumulate stays {self.batch * self.accumulate}).",
            )
        return self.accumulate // ranks


class ValidationPart(Part):
    """The held-out loss."""

    prompts: Count = Field(
        description="prompts held out of training and validated on; the teacher encodes them once, their text stays in RAM as a chunk's"
    )
    every_steps: Count = Field(description="optimizer steps between validations")
    sigma_bands: Count = Field(description="bands of equal width, of noise levels from 0 to 1, in which the loss is reported")


class CheckpointsPart(Part):
    """Saved states of the run."""

    every_steps: Count = Field(description="optimizer steps between checkpoints")
    keep_last: Count = Field(description="newest checkpoints that are kept; the best one is kept besides")


class PreviewPart(Part):
    """Pictures of teacher, student and their difference while training.

    At the last stage's resolution, at 256 tokens and guidance 3.5 if the student is trained at them, else at the longest length and the
    middle guidance that it is trained at. The first process makes them while the others wait, half an hour at most (ranks.TIMEOUT_S).
    """

    every_steps: Count = Field(description="optimizer steps between previews")
    prompts: Annotated[tuple[Text, ...], FROM_LIST, NOT_EMPTY] = Field(
        description="what is painted, always from the same seeds; each takes two whole samplings"
    )
    vae: str = Field(description='a file in models/vae, or a path; "" for no previews')


class OutputPart(Part):
    """The trained encoder."""

    name: FileStem = Field(description="the encoder becomes models/text_encoders/<name>.safetensors")


class Recipe(Part):
    """All that decides the result of a run."""

    name: FileStem = Field(description="name of the recipe")
    seed: int = Field(ge=0, lt=2**31, description="decides everything that is drawn")
    teacher: TeacherPart = Field(description="the text encoder that is imitated")
    diffusion_model: DiffusionModelPart = Field(description="the frozen diffusion model")
    student: StudentPart = Field(description="the text encoder that is trained")
    optimizer: OptimizerPart = Field(description="AdamW and its schedule")
    sampling: SamplingPart = Field(description="the teacher's denoising trajectories")
    validation: ValidationPart = Field(description="the held-out loss")
    checkpoints: CheckpointsPart = Field(description="saved states")
    preview: PreviewPart = Field(description="pictures while training")
    output: OutputPart = Field(description="the trained encoder")
    stages: Annotated[tuple[Stage, ...], FROM_LIST, NOT_EMPTY] = Field(alias="stage", description="the stages of the run, in order")

    @model_validator(mode="after")
    def _stages_have_names_of_their_own(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have one name: found {', '.join(names)}")
        return self

    def to_toml(self) -> str:
        """The canonical text: the same recipe gives the same text, and reading it gives the same recipe."""
        return write_toml(self.model_dump(by_alias=True, exclude_none=True))

    @property
    def family(self) -> Family:
        """The family of its diffusion model."""
        return FAMILIES[self.diffusion_model.family]

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical text in UTF-8."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()

    def differences(self, other: Recipe) -> list[str]:
        """What `other` has otherwise, a line each: `optimizer.learning_rate: 0.0001 -> 0.0002`."""
        mine, theirs = (dict(_leaves(recipe.model_dump(by_alias=True, exclude_none=True))) for recipe in (self, other))
        return [
            f"{path}: {mine.get(path, 'not there')} -> {theirs.get(path, 'not there')}"
            for path in mine | theirs
            if mine.get(path) != theirs.get(path)
        ]


def _leaves(value: Any, path: KeyPath = ()) -> list[tuple[str, str]]:
    """Every value of a dumped recipe with its path; an array of plain values is one value."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, index))]
    return [(dotted(path), toml_value(value))]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that path, or the shipped one of that name, with `part.key=value` and `stage.0.steps=5` settings applied.

    Raises RecipeError that lists every problem: an unknown key with the nearest known one, a wrong value with what was expected, each with
    its line or setting.
    """
    return read_recipe(find_recipe(name_or_path), overrides, Recipe)
