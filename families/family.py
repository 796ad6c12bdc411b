"""What a family of diffusion models is: data, and a few short functions about a loaded model."""

# B batch, C H W latent, T steps

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..students import KINDS

if TYPE_CHECKING:
    from torch import Tensor

    from ..students.kind import Layout, StudentKind

# Most families' large encoder is T5-XXL, and their latents are those of Flux's VAE or of SD3's.
TEXT_WIDTH, LATENT_CHANNELS = 4096, 16


@dataclass(frozen=True)
class Family:
    """Everything that the loader, the trainer and the evaluation know about one family of diffusion models.

    name: the id in recipes, suites and file metadata. display_name: what people call it. modelspec: its name in ModelSpec metadata.

    Text side. clip_type: ComfyUI's CLIPType. text_model: the module of ComfyUI's text model, and in it the names of the tokenizer class and
    of the function that returns the model's factory; text_model_options: that function's arguments. part: the attribute of the text model
    that a student replaces, which is also the key of its tokens. students: kinds of student that can. teacher: kind and named size of the
    network that is replaced. text_width: channels. stacked: how many layers of the large encoder are side by side in them. layers_read: how
    many of its layers, from the first, the text depends on; 0: all. token_length: the length to which ComfyUI pads prompts. padded: whether
    they are padded in training; not where ComfyUI does not pad, or masks padding in encoder and diffusion model. masked: whether the
    encoder ignores padding; where ComfyUI does not pad, that is the padding of a batch of prompts of several lengths. tokenizer_part: the
    attribute of the tokenizer, where it is not `part`. companions: the other encoders of the text model, by attribute, with the width of
    their pooled vectors, which concatenated are the model's. companions_optional: whether ComfyUI's text model does without absent ones, or
    is given zeros in their place. rows_before: the rows [1, K, D] that stand before the encoder's in the text, made of the rows of the
    companions that are there; most_rows_before: how many those are for prompts of usual length.

    Diffusion side. network: ComfyUI's class of the diffusion model, empty where attention maps do not follow it. block_lists: its
    attributes that hold the blocks through which the text goes, in order, with what each of these returns: streams of `image` and `text`,
    or both joined, where the first block returns the text alone or beside the image. last_blocks_without_text: how many of the last blocks
    return no text or one that is discarded, where the others do. cross_attention: the attribute of a block in which the image attends to
    the text alone, and in it the layers of queries, and of keys with values; empty where text and image, in this order, attend to both.
    text_projection: attributes of the model through which the text goes before the first block, in order; a model may lack some.
    keys_values: where the first block has keys and values of the text: a layer, which part of its output's channels, of how many.
    last_layers: attributes of a block whose last linear layer contributes to nothing but the block's output, so that `block_checkpoint`
    need not recompute it. text_width_of: channels of a loaded model's text input.
    latent_channels, latent_dimensions, cell_px: channels of the latent, 2 for images or 3 for video, and pixels of an image per cell of it.
    least_side_px: the smallest image. default_guidance: the value that ComfyUI's nodes propose. takes_guidance: whether a loaded model has
    a guidance input. refuse: a sentence about a loaded model that cannot be used, else None. training_sigmas: noise levels [T + 1] for a
    model, a number of steps, and latent height and width, where ComfyUI's `simple` scheduler is not what the model was trained with.

    unused: tensors that ComfyUI's model has and does not use, so that a file may lack them.

    sources: where the model files of the family's recipes can be downloaded, by file name; those of text encoders are the student kind's.

    small: the class in ComfyUI's supported_models and the configuration of a small model of the family, which takes text of the family's
    width: the stand-in of recipes without model files, and the model of tests. published: what the published models have in the place of
    the small one's values, by file name: with it a run is rehearsed where the file is missing.
    """

    name: str
    display_name: str
    modelspec: str
    clip_type: str
    text_model: tuple[str, str, str]
    token_length: int
    network: str
    block_lists: Mapping[str, tuple[str, ...]]
    text_width_of: Callable[[Any], int]
    refuse: Callable[[Any], str | None]
    small: tuple[str, Mapping[str, Any]]
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    part: str = "t5xxl"
    students: tuple[str, ...] = ("t5",)
    teacher: tuple[str, str] = ("t5", "xxl")
    text_width: int = TEXT_WIDTH
    text_model_options: Mapping[str, str] = field(default_factory=dict)
    stacked: int = 1
    layers_read: int = 0
    cross_attention: tuple[str, ...] = ()
    last_blocks_without_text: int = 0
    text_projection: tuple[str, ...] = ()
    keys_values: tuple[tuple[str, int, int], ...] = ()
    last_layers: tuple[str, ...] = ()
    latent_channels: int = LATENT_CHANNELS
    takes_guidance: Callable[[Any], bool] = lambda _model: False
    latent_dimensions: int = 2
    cell_px: int = 8
    least_side_px: int = 16
    default_guidance: float = 3.5
    training_sigmas: Callable[[Any, int, int, int], Tensor] | None = None
    padded: bool = True
    masked: bool = False
    tokenizer_part: str = ""
    companions: Mapping[str, int] = field(default_factory=dict)
    companions_optional: bool = False
    rows_before: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    most_rows_before: int = 0
    unused: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)

    def text_classes(self) -> tuple[Any, Any]:
        """ComfyUI's tokenizer class, and a factory of its text model."""
        module, tokenizer, model = self.text_model
        found = importlib.import_module(f"comfy.text_encoders.{module}")
        return getattr(found, tokenizer), getattr(found, model)(**self.text_model_options)

    @property
    def kind(self) -> StudentKind:
        """The kind of the large encoder, whose tokens students read too."""
        return KINDS[self.teacher[0]]

    @property
    def teacher_layout(self) -> Layout:
        """The layout of the large encoder."""
        return self.kind.named(self.teacher[1], None)

    @property
    def read_layout(self) -> Layout:
        """The layout of the large encoder without the layers on which the text does not depend."""
        layout: Any = self.teacher_layout
        return replace(layout, num_layers=self.layers_read) if self.layers_read else layout

    @property
    def large_options(self) -> dict[str, Any]:
        """ComfyUI's `model_options` for the large encoder without these layers; see `encoder.large`."""
        return {f"{self.part}_model_config": {"num_hidden_layers": self.layers_read, "final_norm": False}} if self.layers_read else {}

    def tokenizer(self, clip: Any) -> Any:
        """The large encoder's tokenizer in a CLIP of the family; None in another CLIP."""
        return getattr(clip.tokenizer, self.tokenizer_part or self.part, None)

    def latent_shape(self, side_px: int) -> tuple[int, ...]:
        """The shape of the latent of a square image, without its batch: [C, H, W], or [C, 1, H, W] where latents are videos."""
        side = side_px // self.cell_px
        return (self.latent_channels, *[1] * (self.latent_dimensions - 2), side, side)

    def check_side(self, side_px: int) -> None:
        """Raise ValueError for images smaller than the family's models can process."""
        if side_px < self.least_side_px:
            raise ValueError(f"expected at least {self.least_side_px} pixels for {self.display_name}, got {side_px}")
