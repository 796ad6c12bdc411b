"""A baseline for the miniature: an encoder without context, whose embedding of a token is a vector of the token plus one of its place.

Trained as a student is, by the trainer's own parts, it says what is left for attention to do.
"""

# B batch, L text tokens, D text width

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from ..families import FAMILIES
from ..miniature.paint import Encode
from ..runtime.disk import replace_file
from ..runtime.ranks import Ranks
from ..students.t5.tokens import fit
from ..train.distill import train_step
from ..train.objectives import OBJECTIVES
from ..train.optimizer import make_optimizer
from ..train.recipe import Recipe
from ..train.workshop import open_workshop
from ..world.captions import TOKEN_LENGTH

VOCABULARY = 32_128


class ContextFree(Module):
    """Token ids [B, L] to embeddings [B, L, D] by two tables."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = Embedding(VOCABULARY, width)
        self.place = Parameter(torch.zeros(TOKEN_LENGTH, width))

    def forward(self, token_ids_BL: Tensor) -> Tensor:
        return self.token(token_ids_BL) + self.place[: token_ids_BL.shape[1]]


def train_context_free(recipe: Recipe, path: Path) -> None:
    """Train the baseline by a student's recipe, from random values, and write it to `path`. ComfyUI must be importable."""
    workshop: Any = open_workshop(recipe, Ranks())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        student = ContextFree(workshop.model.text_width).to(workshop.model.device)
    part = recipe.optimizer
    optimizer = make_optimizer(student, part.learning_rate, (part.beta1, part.beta2), part.weight_decay)
    learner = replace(workshop.learner, student=student, optimizer=optimizer, without_sync=contextlib.nullcontext)
    workshop = replace(workshop, student=student, learner=learner)
    positions = []
    with workshop.model.differentiable(recipe.diffusion_model.checkpoint_blocks):
        while learner.step < workshop.schedule.total_steps:
            place = workshop.schedule.place(learner.step)
            if place.step == 0:
                texts = workshop.chunks.take(place.stage, place.trajectory)
                positions = workshop.starts(workshop.schedule.batches(place.stage, place.trajectory), texts)
            objective = OBJECTIVES[recipe.stages[place.stage].objective]
            report, positions = train_step(positions, workshop.model, learner, objective)
            if learner.step % recipe.validation.every_steps == 0:
                print(f"context-free: step {learner.step} of {workshop.schedule.total_steps}, loss {report.loss:.4f}", flush=True)
    replace_file(path, safetensors.torch.save({name: weight.contiguous() for name, weight in student.state_dict().items()}))


def context_free_encoder(path: Path, tokenizer: Any) -> Encode:
    """The trained baseline as a function from captions to text embeddings and pooled vectors."""
    tensors = safetensors.torch.load_file(path)
    student = ContextFree(tensors["place"].shape[1])
    student.load_state_dict(tensors)

    @torch.no_grad()
    def encode(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        token_ids_BL = torch.tensor([fit(tokenizer(caption)["input_ids"], TOKEN_LENGTH) for caption in captions])
        return student(token_ids_BL), torch.zeros(len(captions), FAMILIES["flux"].pooled_width)

    return encode
