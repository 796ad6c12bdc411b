"""The teacher: text embeddings and pooled vectors of prompts, on the CPU."""

# B batch, N stacked layers, L text tokens, D text width, P pooled width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import DEFAULT
from ..families.family import Family
from ..runtime.errors import StudentFileError, UndistilledError
from ..runtime.grouping import alike
from ..runtime.weights import read_header
from .companions import open_companion
from .files import open_student
from .large import load_large
from .needed_tensors import CLIPS, check_companions_given, check_large_tensors
from .rows import Rows
from .served import ServingOptions, load_encoder
from .teacher_text import TeacherText


class Teacher:
    """A CLIP of ComfyUI used as teacher. Without companions (CLIP-L), pooled vectors are zeros."""

    def __init__(self, clip: Any, family: Family = DEFAULT) -> None:
        self.clip, self.family = clip, family
        self.text_model = getattr(clip.cond_stage_model, family.part)
        self._empty: dict[int, TeacherText] = {}

    def token_ids(self, prompts: Sequence[str], length: int) -> list[list[int]]:
        """Token ids of each prompt, in the chat template where ComfyUI's tokenizer has one.

        Cut to `length` with the end token or the end of the template last, or padded to it where the family pads. Prompts are taken
        literally, without weights.
        """
        tokenizer, kind = self.family.tokenizer(self.clip).tokenizer, self.family.kind
        template = getattr(self.clip.tokenizer, "llama_template", "{}")
        ending = tokenizer(template.partition("{}")[2])["input_ids"]
        found = [tokenizer(template.format(prompt))["input_ids"] for prompt in prompts]
        return [kind.fit(ids, length if self.family.padded else min(length, len(ids)), ending) for ids in found]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], length: int, with_empty: bool = False) -> TeacherText:
        """Encode prompts together at one length. Results differ in the last bits with the composition of a batch."""
        token_ids = self.token_ids(prompts, length)
        self.clip.load_model()
        model = self.clip.cond_stage_model
        model.reset_clip_options()
        model.set_clip_options({"execution_device": self.clip.patcher.load_device})
        longest = max(map(len, token_ids))
        text_BLD = self._encoded(token_ids, longest)
        companions = [self._companions(prompt, text_BLD.shape[-1]) for prompt in prompts]
        pooled_BP = torch.stack([pooled_P for pooled_P, _ in companions])
        rows = None
        if not self.family.padded or self.family.rows_before is not None:
            rows = Rows(tuple(map(len, token_ids)), tuple(before_KD for _, before_KD in companions))
        ids_BL = torch.tensor([self.family.kind.fit(ids, longest) for ids in token_ids])
        return TeacherText(ids_BL, text_BLD, pooled_BP, rows, self._empty_at(length) if with_empty else None)

    def _empty_at(self, length: int) -> TeacherText:
        if length not in self._empty:
            self._empty[length] = self.encode([""], length)
        return self._empty[length]

    def _encoded(self, token_ids: Sequence[list[int]], longest: int) -> Tensor:
        """The large encoder's rows [B, L, D], those of equal length together; zeros beyond a prompt's own."""
        groups = alike(map(len, token_ids))
        found = [side_by_side(self.text_model.encode([token_ids[place] for place in group])[0]).float().cpu() for group in groups]
        if len(groups) == 1:
            return found[0]
        text_BLD = torch.zeros(len(token_ids), longest, found[0].shape[-1])
        for group, rows_GLD in zip(groups, found, strict=True):
            text_BLD[group, : rows_GLD.shape[1]] = rows_GLD
        return text_BLD

    def _companions(self, prompt: str, text_width: int) -> tuple[Tensor, Tensor]:
        """The pooled vector [P] of a prompt, zeros for absent companions, and the rows [K, text_width] that they put before the text."""
        rows: dict[str, Tensor] = {}
        pooled = [torch.zeros(0)]
        for name, width in self.family.companions.items():
            encoder = getattr(self.clip.cond_stage_model, name)
            pooled.append(torch.zeros(width))
            if encoder is not None:
                chunks = getattr(self.clip.tokenizer, name).tokenize_with_weights(literal(prompt))
                rows[name], pooled_1P = encoder.encode_token_weights(chunks)[:2]
                pooled[-1] = pooled_1P[0].float().cpu()
        before = self.family.rows_before
        none = torch.zeros(0, text_width)
        return torch.cat(pooled), none if before is None or not rows else before(rows)[0].float().cpu()


def side_by_side(text: Tensor) -> Tensor:
    """Layers [B, N, L, D] that a family stacks as one text [B, L, N x D]; a text of one layer as it is."""
    return text.movedim(1, 2).flatten(2) if text.ndim == 4 else text


def literal(prompt: str) -> str:
    """The prompt with ComfyUI's weight syntax escaped: in training captions, parentheses are only parentheses."""
    return prompt.replace("(", "\\(").replace(")", "\\)")


def load_teacher(path: Path, companions: Mapping[str, Path], family: Family = DEFAULT) -> Teacher:
    """The network that students of the family replace (in any form that ComfyUI loads), or an encoder file, with some of the companions.

    Raises ValueError for a file that is neither, or incomplete.
    """
    for name, file in companions.items():
        _check_companion(name, file)
    large, others = family.teacher_layout, {name: str(file) for name, file in companions.items()}
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
        return Teacher(load_encoder(str(path), others, ServingOptions(family.name)).clip, family)
    check_companions_given(companions, family)
    check_large(path, family)
    return Teacher(load_large([*others.values(), str(path)], family), family)


def _check_companion(name: str, path: Path) -> None:
    try:
        open_companion(name, path)
    except StudentFileError as error:
        clip = CLIPS[name].display_name
        raise ValueError(f'{error.problem}\nWhat to do: name a complete {clip} file in teacher.{name}, or "none" for zeros.') from error


def check_large(path: Path, family: Family = DEFAULT) -> None:
    """Raise StudentFileError unless the file holds every tensor of the network that students replace."""
    check_large_tensors(read_header(path)[0], path.name, family)
