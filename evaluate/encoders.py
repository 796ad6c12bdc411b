"""The text encoders of an evaluation: found, named, told apart, loaded through ComfyUI, and asked for texts."""

# L text tokens, D text width, P pooled width

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoder.files import open_student
from ..encoder.prompt_length import is_padding, t5_tokens
from ..encoder.teacher import Teacher, literal, load_teacher
from ..runtime.comfyui import model_file
from ..runtime.errors import StudentFileError
from .fingerprint import fingerprint
from .suite import Suite

NO_CLIP_L = "none"
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class EncoderFile:
    """An encoder of the table: its name there, its file, the CLIP-L beside it (None: pooled vectors are zeros)."""

    name: str
    path: Path
    clip_l: Path | None

    def made_of(self) -> dict[str, str]:
        """What tells it apart from every other encoder."""
        return {"encoder": fingerprint(self.path), "clip_l": NO_CLIP_L if self.clip_l is None else fingerprint(self.clip_l)}


def find_encoders(suite: Suite, students: Sequence[str]) -> list[EncoderFile]:
    """The teacher, then the suite's students, then the given ones; each file once, each under a name of its own.

    Raises ValueError for a file that is not there.
    """
    clip_l = None if suite.teacher.clip_l == NO_CLIP_L else model_file(suite.teacher.clip_l, "text_encoders")
    paths = dict.fromkeys(_found(name) for name in (suite.teacher.t5, *suite.students, *students))
    names = _names(paths)
    return [EncoderFile(name, path, _clip_l_of(path, clip_l)) for name, path in zip(names, paths, strict=True)]


def _found(name: str) -> Path:
    path = model_file(name, "text_encoders")
    if path.suffix.lower() == ".gguf":
        raise ValueError(
            f"{path.name} is a GGUF file, which ComfyUI itself does not load.\n"
            "What to do: compare with the fp8 file of the same encoder, which has about the size of Q8_0."
        )
    return path


def _names(paths: Iterable[Path]) -> list[str]:
    """The files' names without ending, as folders may be called; those that are alike are numbered."""
    names: list[str] = []
    for path in paths:
        stem = NOT_IN_NAMES.sub("_", path.stem).strip(".") or "encoder"
        taken, name = 1, stem
        while name.lower() in {other.lower() for other in names}:
            taken += 1
            name = f"{stem}-{taken}"
        names.append(name)
    return names


def _clip_l_of(path: Path, clip_l: Path | None) -> Path | None:
    """The CLIP-L beside an encoder: none if it was trained with zeros in the place of the pooled vector."""
    try:
        return None if open_student(path).metadata.pooled == "zero" else clip_l
    except StudentFileError:
        # A T5-XXL, or a file that loading will refuse with reasons.
        return clip_l


@dataclass(frozen=True)
class Text:
    """What an encoder says about a prompt, on the CPU: embeddings [1, L, D], pooled vector [1, P], and the prompt's own tokens of L."""

    text_1LD: Tensor
    pooled_1P: Tensor
    own_tokens: int


class LoadedEncoder:
    """An encoder in ComfyUI, as its loader node gives it (DualCLIPLoader, Distilled T5 Loader)."""

    def __init__(self, file: EncoderFile, teacher: Teacher) -> None:
        self.file = file
        self.teacher = teacher

    @classmethod
    def load(cls, file: EncoderFile) -> LoadedEncoder:
        """The encoder of a file. Raises ValueError for one that is neither a T5-XXL nor a distilled T5, or not whole."""
        return cls(file, load_teacher(file.path, file.clip_l))

    @property
    def clip(self) -> Any:
        """The host's CLIP."""
        return self.teacher.clip

    @torch.no_grad()
    def text(self, prompt: str) -> Text:
        """A prompt by itself, as CLIP Text Encode gives it; it is taken literally, without weights."""
        tokens = self.clip.tokenize(literal(prompt))
        [(text_1LD, extras)] = self.clip.encode_from_tokens_scheduled(tokens)
        own = sum(not is_padding(token) for token in t5_tokens(tokens))
        return Text(text_1LD.float().cpu(), extras["pooled_output"].float().cpu(), own)

    @classmethod
    def fitting(cls, file: EncoderFile, width: int, model: str) -> LoadedEncoder:
        """The encoder of a file, once it is seen that its texts are as wide as the diffusion model takes them. Raises ValueError."""
        encoder = cls.load(file)
        encoder._check_width(width, model)
        return encoder

    def _check_width(self, width: int, model: str) -> None:
        found = self.text("a").text_1LD.shape[-1]
        if found != width:
            raise ValueError(
                f"{self.file.path.name} gives text of width {found}, but {model} takes {width}.\n"
                "What to do: name an encoder that was made for this diffusion model."
            )


def together(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Texts of one length as a batch: [B, L, D] and [B, P]."""
    return torch.cat([text.text_1LD for text in texts]), torch.cat([text.pooled_1P for text in texts])


def of_one_length(texts: Sequence[Text]) -> list[list[int]]:
    """Places of the texts in groups that can be put together: a prompt beyond the padded length is longer than the others."""
    groups: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        groups.setdefault(text.text_1LD.shape[1], []).append(place)
    return list(groups.values())
