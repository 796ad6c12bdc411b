"""The teacher: text embeddings and pooled vectors of prompts, on the CPU."""

# B batch, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.sd
import torch
from torch import Tensor

from ..families import FAMILIES
from ..runtime.errors import StudentFileError, listed
from ..students.t5.layout import StudentLayout
from ..students.t5.tokens import fit
from .clip_l import open_clip_l
from .dialects import published_names
from .files import open_student, read_header
from .served import ServingOptions, load_encoder

if TYPE_CHECKING:
    from ..train.batches import Batch


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

    def texts(self, batches: Iterable[Batch]) -> list[TeacherText]:
        """Encode batches, each by itself at its own length: the company that prompts are encoded in decides their last bits."""
        return [self.encode(batch.prompts, batch.drawn.token_length) for batch in batches]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int) -> TeacherText:
        """Encode prompts together at one padded length."""
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

    Raises ValueError for a file that is neither, or not whole.
    """
    if clip_l is not None:
        _check_clip_l(clip_l)
    try:
        open_student(t5)
    except StudentFileError as error:
        if "DualCLIPLoader" not in error.remedy:
            raise ValueError(
                f"{error.problem}\nThe teacher must be a T5-XXL or a distilled T5, in one whole file.\n"
                "What to do: name such a .safetensors of models/text_encoders in teacher.t5."
            ) from error
    else:
        return Teacher(load_encoder(str(t5), None if clip_l is None else str(clip_l), ServingOptions()).clip, _pooled_kind(clip_l))
    if clip_l is None:
        raise ValueError("A T5-XXL teacher is loaded together with CLIP-L.\nWhat to do: name a CLIP-L file in teacher.clip_l.")
    check_t5xxl(t5)
    return Teacher(comfy.sd.load_clip([str(clip_l), str(t5)], clip_type=comfy.sd.CLIPType.FLUX))


def _check_clip_l(path: Path) -> None:
    try:
        open_clip_l(path)
    except StudentFileError as error:
        raise ValueError(f'{error.problem}\nWhat to do: name a whole CLIP-L file in teacher.clip_l, or "none" for zeros.') from error


def check_t5xxl(path: Path) -> None:
    """Raise ValueError unless every tensor of a T5-XXL is in the file, whatever else is (scales of fp8, a tokenizer).

    ComfyUI only warns of weights that a file lacks, and would teach with whatever lies in their memory.
    """
    shapes, _, _ = read_header(path)
    names = published_names(shapes)
    wanted = StudentLayout.named("xxl", None).tensors()
    wrong = [name for name, shape in wanted.items() if name not in names or tuple(shapes[names[name]]) != shape]
    if wrong:
        raise ValueError(
            f"{path.name} is no whole T5-XXL: {len(wrong)} of {len(wanted)} tensors are missing or of another shape.\n{listed(wrong, 10)}\n"
            "What to do: name a whole T5-XXL (fp16, bf16 or fp8, not packed in 4 bits) in teacher.t5."
        )


def _pooled_kind(clip_l: Path | None) -> str:
    return "zero" if clip_l is None else "clip_l"
