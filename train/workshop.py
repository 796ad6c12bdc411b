"""What a process of a run works with: prompts, models, student, optimizer."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..diffusion.frozen import FrozenModel, usable_bytes
from ..encoder.teacher import Teacher, TeacherText
from ..runtime.ranks import Ranks
from ..students.trained import TrainedStudent
from .batches import Batch, Place, Schedule
from .distill import Learner, linear_schedule, loss_scaler
from .inputs import inputs_of, refuse_other_inputs
from .memory import MemoryNeed
from .models import check_before_loading, load_frozen_model, load_teacher_of, make_student_of, memory_need_of, preview_vae
from .optimizer import make_optimizer
from .recipe import Recipe
from .teacher_chunks import TeacherChunks
from .trajectory import Position


@dataclass
class RunState:
    """What changes along a run besides the learner: the lowest held-out loss so far, and the positions on the trajectory."""

    best: float | None = None
    positions: list[Position] = field(default_factory=list)


@dataclass
class Workshop:
    """Everything that a process of a run works with."""

    recipe: Recipe
    ranks: Ranks
    schedule: Schedule
    model: FrozenModel
    teacher: Teacher
    chunks: TeacherChunks
    need: MemoryNeed
    student: TrainedStudent
    learner: Learner
    inputs: dict[str, str]

    def position(self, batch: Batch, text: TeacherText) -> Position:
        """The start of a batch's trajectory, on the diffusion model's device."""
        device, drawn, empty = self.model.device, batch.drawn, text.empty
        sigmas_T = self.model.training_sigmas(self.recipe.sampling.steps, *drawn.noise.shape[-2:])
        return Position(
            step=0,
            x=self.model.noisy(drawn.noise.to(device), sigmas_T),
            sigmas_T=sigmas_T,
            text_BLD=text.text_BLD.to(device),
            extras=text.extras(device),
            guidance_B=None if drawn.guidance_B is None else drawn.guidance_B.to(device),
            token_ids_BL=text.token_ids_BL.to(device),
            rows=None if text.rows is None else text.rows.to(device),
            cfg_B=drawn.cfg_B,
            unconditional=None if empty is None else (empty.whole.to(device), empty.extras(device)),
        )

    def embed(self, token_ids_BL: Tensor) -> Tensor:
        """The student's embeddings [B, L, D] on this process alone: DistributedDataParallel's forward may wait for the others."""
        return replace(self.learner, student=self.student).embed(token_ids_BL)

    def load_model(self) -> None:
        """Bring the diffusion model to its device, with as much free memory beside it as an optimizer step takes."""
        weights = sum(map(Tensor.numel, self.student.parameters()))
        self.model.load(self.need.room(weights, bool(self.learner.optimizer.state), usable_bytes(self.model.device)))

    def starts(self, batches: Sequence[Batch], texts: Sequence[TeacherText]) -> list[Position]:
        """The starts of some batches' trajectories, with the diffusion model brought back to its device."""
        self.load_model()
        return [self.position(batch, text) for batch, text in zip(batches, texts, strict=True)]

    def starts_at(self, place: Place) -> list[Position]:
        """The starts of this process's batches on the trajectory of a place."""
        texts = self.chunks.take(place.stage, place.trajectory)
        return self.starts(self.schedule.batches(place.stage, place.trajectory), texts)


def open_workshop(recipe: Recipe, ranks: Ranks, recorded: Mapping[str, str] | None = None) -> Workshop:
    """Read prompts, load models, make the student.

    `recorded` are the inputs of the run that is resumed. Raises ValueError for whatever is missing or does not fit together, and for too
    little memory and other inputs before anything is loaded.
    """
    schedule = Schedule(recipe, ranks.rank, ranks.world)
    # A missing VAE is reported now and not at the first preview.
    preview_vae(recipe)
    inputs = inputs_of(recipe, schedule)
    refuse_other_inputs(recorded or {}, inputs)
    check_before_loading(recipe, ranks)
    # Before the large models, so that a start of another size is refused within seconds.
    student = make_student_of(recipe)
    model = load_frozen_model(recipe)
    teacher = load_teacher_of(recipe, model)
    student = student.to(model.device)
    chunks = TeacherChunks(teacher, schedule, recipe.teacher.chunk_prompts)
    learner = _learner(recipe, ranks, student, model)
    return Workshop(recipe, ranks, schedule, model, teacher, chunks, memory_need_of(recipe, model, teacher), student, learner, inputs)


def _learner(recipe: Recipe, ranks: Ranks, student: TrainedStudent, model: FrozenModel) -> Learner:
    wrapped = ranks.wrap(student)
    ranks.warm_up(wrapped, torch.zeros(1, 2, dtype=torch.long))
    part = recipe.optimizer
    return Learner(
        student=wrapped,
        optimizer=make_optimizer(student, part.learning_rate, (part.beta1, part.beta2), part.weight_decay, part.muon_learning_rate),
        learning_rate=linear_schedule(part.learning_rate, part.warmup_steps, *recipe.periods),
        max_gradient_norm=part.max_gradient_norm,
        autocast_dtype=torch.bfloat16 if part.autocast == "bf16" else None,
        device=model.device,
        mean_over_ranks=ranks.mean,
        without_sync=functools.partial(ranks.no_sync, wrapped),
        scaler=loss_scaler(model),
    )
