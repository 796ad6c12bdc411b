"""The teacher: text embeddings and pooled vectors of prompts, on the CPU."""

# B batch, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ..families import DEFAULT
from ..families.family import Family
from ..runtime.errors import StudentFileError, UndistilledError
from ..runtime.weights import read_header
from .clip_l import open_clip_l
from .files import open_student
from .needed_tensors import check_large_tensors
from .served import ServingOptions, load_encoder


@dataclass(frozen=True)
class TeacherText:
    """The teacher's encoding of a batch of prompts, on the CPU: token ids [B, L], embeddings [B, L, D], pooled vectors [B, P]."""

    token_ids_BL: Tensor
    text_BLD: Tensor
    pooled_BP: Tensor


class Teacher:
    """A CLIP of ComfyUI used as teacher. Without companions (CLIP-L), pooled vectors are zeros."""

    def __init__(self, clip: Any, family: Family = DEFAULT) -> None:
        self.clip, self.family = clip, family
        self.text_model = getattr(clip.cond_stage_model, family.part)

    def token_ids(self, prompts: Sequence[str], length: int) -> Tensor:
        """Token ids [B, L]: cut to `length` with the end token last, or padded. Prompts are taken literally, without weights."""
        tokenizer, kind = self.family.tokenizer(self.clip).tokenizer, self.family.kind
        return torch.tensor([kind.fit(tokenizer(prompt)["input_ids"], length) for prompt in prompts])

    def texts(self, batches: Iterable[tuple[Sequence[str], int]]) -> list[TeacherText]:
        """Encode batches of prompts, each with its token length, separately: results differ in the last bits with batch composition."""
        return [self.encode(prompts, length) for prompts, length in batches]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int) -> TeacherText:
        """Encode prompts together at one padded length."""
        token_ids_BL = self.token_ids(prompts, length)
        self.clip.load_model()
        model = self.clip.cond_stage_model
        model.reset_clip_options()
        model.set_clip_options({"execution_device": self.clip.patcher.load_device})
        text_BLD = self.text_model.encode(token_ids_BL.tolist())[0].float().cpu()
        pooled = [self._pooled(name, prompts) for name in self.family.companions]
        return TeacherText(token_ids_BL, text_BLD, torch.cat([torch.zeros(len(prompts), 0), *pooled], dim=-1))

    def _pooled(self, companion: str, prompts: Sequence[str]) -> Tensor:
        encoder, tokenizer = getattr(self.clip.cond_stage_model, companion), getattr(self.clip.tokenizer, companion)
        tokens = [tokenizer.tokenize_with_weights(literal(prompt)) for prompt in prompts]
        return torch.cat([encoder.encode_token_weights(chunks)[1].float().cpu() for chunks in tokens])


def literal(prompt: str) -> str:
    """The prompt with ComfyUI's weight syntax escaped: in training captions, parentheses are only parentheses."""
    return prompt.replace("(", "\\(").replace(")", "\\)")


def load_teacher(path: Path, clip_l: Path | None, family: Family = DEFAULT) -> Teacher:
    """The network that students of the family replace (in any form that ComfyUI loads), or an encoder file, with CLIP-L or without.

    Raises ValueError for a file that is neither, or incomplete.
    """
    if clip_l is not None:
        _check_clip_l(clip_l)
    clip_l_name = None if clip_l is None else str(clip_l)
    large = family.teacher_layout
    try:
        open_student(path)
    except UndistilledError:
        pass  # the network itself: loaded below
    except StudentFileError as error:
        raise ValueError(
            f"{error.problem}\nThe teacher must be a complete {large.size_name} or distilled {family.kind.display_name} in one file.\n"
            "What to do: name such a .safetensors of models/text_encoders in teacher.t5."
        ) from error
    else:
        return Teacher(load_encoder(str(path), clip_l_name, ServingOptions(family.name)).clip, family)
    if family.companions and clip_l_name is None:
        raise ValueError(f"A {large.size_name} teacher is loaded with CLIP-L.\nWhat to do: name a CLIP-L file in teacher.clip_l.")
    check_large(path, family)
    files = [name for name in (clip_l_name, str(path)) if name is not None]
    return Teacher(comfy.sd.load_clip(files, clip_type=comfy.sd.CLIPType[family.clip_type]), family)


def _check_clip_l(path: Path) -> None:
    try:
        open_clip_l(path)
    except StudentFileError as error:
        raise ValueError(f'{error.problem}\nWhat to do: name a complete CLIP-L file in teacher.clip_l, or "none" for zeros.') from error


def check_large(path: Path, family: Family = DEFAULT) -> None:
    """Raise StudentFileError unless the file holds every tensor of the network that students replace."""
    check_large_tensors(read_header(path)[0], path.name, family)
