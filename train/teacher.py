"""The teacher: text embeddings and pooled vectors of whole chunks of prompts, once per trajectory, kept in bounded RAM."""

# B batch, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ..encoder.errors import StudentFileError
from ..encoder.families import FAMILIES
from ..encoder.files import open_student
from ..encoder.served import ServingOptions, load_encoder
from .token_ids import fit


@dataclass(frozen=True)
class TeacherText:
    """What the teacher says about a batch of prompts, on the CPU: token ids [B, L], embeddings [B, L, D], pooled vectors [B, P]."""

    token_ids_BL: Tensor
    text_BLD: Tensor
    pooled_BP: Tensor


class Teacher:
    """A CLIP of ComfyUI used as teacher. Without CLIP-L, or if the recipe says so, pooled vectors are zeros."""

    def __init__(self, clip: Any, pooled: str = "clip_l") -> None:
        self.clip = clip
        self.pooled = pooled
        model = clip.cond_stage_model
        self.text_model = getattr(model, "t5xxl", None) or model.t5base
        self.clip_l = getattr(model, "clip_l", None) if pooled == "clip_l" else None

    def token_ids(self, prompts: Sequence[str], length: int) -> Tensor:
        """T5 token ids [B, L]: cut to `length` with the end token last, or padded. Prompts are taken literally, without weights."""
        tokenizer = self.clip.tokenizer.t5xxl.tokenizer
        return torch.tensor([fit(tokenizer(prompt)["input_ids"], length) for prompt in prompts])

    def encode(self, prompts: Sequence[str], length: int, at_once: int | None = None) -> TeacherText:
        """Encode prompts at one padded length, `at_once` of them at a time (all, if None), which bounds the memory it takes."""
        size = at_once or len(prompts)
        parts = [self._encode_chunk(prompts[start : start + size], length) for start in range(0, len(prompts), size)]
        return TeacherText(
            torch.cat([part.token_ids_BL for part in parts]),
            torch.cat([part.text_BLD for part in parts]),
            torch.cat([part.pooled_BP for part in parts]),
        )

    @torch.no_grad()
    def _encode_chunk(self, prompts: Sequence[str], length: int) -> TeacherText:
        token_ids_BL = self.token_ids(prompts, length)
        self.clip.load_model()
        model = self.clip.cond_stage_model
        model.reset_clip_options()
        model.set_clip_options({"execution_device": self.clip.patcher.load_device})
        text_BLD = self.text_model.encode(token_ids_BL.tolist())[0].float().cpu()
        return TeacherText(token_ids_BL, text_BLD, self._pooled(prompts))

    def _pooled(self, prompts: Sequence[str]) -> Tensor:
        if self.clip_l is None:
            return torch.zeros(len(prompts), FAMILIES["flux"].pooled_width)
        tokenizer = self.clip.tokenizer.clip_l
        tokens = [tokenizer.tokenize_with_weights(literal(prompt)) for prompt in prompts]
        return torch.cat([self.clip_l.encode_token_weights(chunks)[1].float().cpu() for chunks in tokens])


def literal(prompt: str) -> str:
    """The prompt with ComfyUI's weight syntax escaped: a training caption's parentheses are only parentheses."""
    return prompt.replace("(", "\\(").replace(")", "\\)")


def load_teacher(t5: Path, clip_l: Path | None) -> Teacher:
    """T5-XXL (any form the host loads) or an encoder file of ours, with CLIP-L or without.

    Raises ValueError for a file that is neither.
    """
    try:
        open_student(t5)
    except StudentFileError as error:
        if "DualCLIPLoader" not in error.remedy:
            raise ValueError(f"The teacher must be a T5-XXL or a distilled T5.\n{error}") from error
    else:
        return Teacher(load_encoder(str(t5), None if clip_l is None else str(clip_l), ServingOptions()).clip, _pooled_kind(clip_l))
    if clip_l is None:
        raise ValueError("A T5-XXL teacher is loaded together with CLIP-L.\nWhat to do: name a clip_l file in the recipe's teacher part.")
    return Teacher(comfy.sd.load_clip([str(clip_l), str(t5)], clip_type=comfy.sd.CLIPType.FLUX))


def _pooled_kind(clip_l: Path | None) -> str:
    return "zero" if clip_l is None else "clip_l"
