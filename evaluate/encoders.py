"""The text encoders of an evaluation: found, checked, loaded into ComfyUI, and used on prompts."""

# L text tokens, D text width, P pooled width

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoder.files import open_student
from ..encoder.prompt_length import own_tokens
from ..encoder.teacher import Teacher, check_large, literal, load_teacher
from ..families import FAMILIES
from ..families.family import Family
from ..runtime.comfyui import NO_FILE, model_file
from ..runtime.errors import StudentFileError, UndistilledError
from .provenance import fingerprint
from .suite import Suite

NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class EncoderFile:
    """An encoder of the table: its name there, its file, the companions beside it (without, pooled vectors are zeros)."""

    name: str
    path: Path
    companions: Mapping[str, Path] = field(default_factory=dict)

    def made_of(self) -> dict[str, str]:
        """What distinguishes it from every other encoder."""
        beside = {"clip_l": NO_FILE} | {name: fingerprint(path) for name, path in self.companions.items()}
        return {"encoder": fingerprint(self.path), **beside}


def find_encoders(suite: Suite, students: Sequence[str]) -> list[EncoderFile]:
    """The teacher, then the suite's students, then the given ones, each FILE or NAME=FILE; each file once, each under a name of its own.

    Raises ValueError for a file that is not there, and for a name that two files were given.
    """
    companions = {name: model_file(file, "text_encoders") for name, file in suite.teacher.companions.items()}
    given: dict[Path, str] = {}
    for text in (suite.teacher.t5, *suite.students, *students):
        name, equals, file = text.partition("=")
        named = equals and not NOT_IN_NAMES.search(name)
        path = model_file(file if named else text, "text_encoders")
        given[path] = name if named else given.get(path, "")
    return [EncoderFile(name, path, _companions_of(path, companions)) for name, path in zip(_names(given), given, strict=True)]


def _names(given: Mapping[Path, str]) -> list[str]:
    """The given names, else those of the files without ending, as names of folders; equal ones of these are numbered."""
    names = [name for name in given.values() if name]
    lower = [name.lower() for name in names]
    if len({*lower}) < len(lower) or any(not name.strip(".") for name in lower):
        raise ValueError(f"Expected a different name for every encoder, got {', '.join(names)}.\nWhat to do: change a NAME in NAME=FILE.")
    found: list[str] = []
    for path, name in given.items():
        stem = NOT_IN_NAMES.sub("_", path.stem).strip(".") or "encoder"
        taken, unique = 1, name or stem
        while not name and unique.lower() in {other.lower() for other in (*names, *found)}:
            taken += 1
            unique = f"{stem}-{taken}"
        found.append(unique)
    return found


def _companions_of(path: Path, given: Mapping[str, Path]) -> Mapping[str, Path]:
    """The companions beside an encoder: those of a student's training."""
    try:
        trained_with = open_student(path).metadata.pooled.split("+")
    except StudentFileError:  # a T5-XXL, or a file that `check_encoders` refuses
        return given
    return {name: file for name, file in given.items() if name in trained_with}


def check_encoders(encoders: Sequence[EncoderFile], width: int, model: str, family: Family) -> None:
    """Check every file's header and its text width, before any image is generated. Raises ValueError that lists all that do not fit."""
    problems = [problem for encoder in encoders if (problem := _problem(encoder.path, width, model, family))]
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"Not all encoders can be compared:\n{listed}\n"
            "What to do: name complete encoder files made for this diffusion model, in teacher.t5, in students or with --student."
        )


def _problem(path: Path, width: int, model: str, family: Family) -> str | None:
    if path.suffix.lower() == ".gguf":
        return f"{path.name} is a GGUF file, which ComfyUI itself does not load; its fp8 file has about the size of Q8_0."
    try:
        student = open_student(path)
        found = student.layout.output_width
        if family.name not in student.metadata.families:
            made_for = " and ".join(FAMILIES[name].display_name for name in student.metadata.families)
            return f"{path.name} was distilled for {made_for}, but {model} is of the family {family.display_name}."
    except UndistilledError:
        try:
            check_large(path, family)
        except ValueError as incomplete:
            return str(incomplete).partition("\n")[0]
        found = family.text_width
    except StudentFileError as error:
        return error.problem
    return None if found == width else f"{path.name} gives text of width {found}, but {model} takes {width}."


@dataclass(frozen=True)
class Text:
    """An encoded prompt, on the CPU: embeddings [1, L, D], pooled vector [1, P], and how many of L are the prompt's own tokens.

    before: how many rows of companions stand before them. negative: the encoded negative prompt, with classifier-free guidance.
    """

    text_1LD: Tensor
    pooled_1P: Tensor
    own_tokens: int
    before: int = 0
    negative: Text | None = None

    @property
    def own_1LD(self) -> Tensor:
        """The rows of the prompt's own tokens."""
        return self.text_1LD[:, self.before : self.before + self.own_tokens]


class LoadedEncoder:
    """An encoder in ComfyUI, as its loader node gives it (DualCLIPLoader, Distilled Text Encoder Loader)."""

    def __init__(self, file: EncoderFile, teacher: Teacher, negative: str | None = None) -> None:
        self.file = file
        self.clip: Any = teacher.clip
        self._negative: Text | None = None
        if negative is not None:
            self._negative = self.text(negative)

    @classmethod
    def load(cls, file: EncoderFile, family: Family, negative: str | None = None) -> LoadedEncoder:
        """The encoder of a file, with a negative prompt for all others, if there is one.

        Raises ValueError for a file that is neither the large encoder nor a student, or incomplete.
        """
        return cls(file, load_teacher(file.path, file.companions, family), negative)

    @torch.no_grad()
    def text(self, prompt: str) -> Text:
        """A single prompt as CLIP Text Encode encodes it, taken literally, without weights."""
        tokens = self.clip.tokenize(literal(prompt))
        [(text_1LD, extras)] = self.clip.encode_from_tokens_scheduled(tokens)
        own, pooled_1P = own_tokens(self.clip, tokens), extras.get("pooled_output")
        pooled_1P = torch.zeros(1, 0) if pooled_1P is None else pooled_1P.float().cpu()
        return Text(text_1LD.float().cpu(), pooled_1P, sum(own), text_1LD.shape[1] - len(own), self._negative)


def together(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Texts of one length as a batch: [B, L, D] and [B, P]."""
    return torch.cat([text.text_1LD for text in texts]), torch.cat([text.pooled_1P for text in texts])


def by_length(*texts_of_encoders: Sequence[Text]) -> list[list[int]]:
    """Places of the prompts in groups whose texts can be batched: a prompt beyond the padded length is longer than the others."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, texts in enumerate(zip(*texts_of_encoders, strict=True)):
        groups.setdefault(tuple(text.text_1LD.shape[1] for text in texts), []).append(place)
    return list(groups.values())
