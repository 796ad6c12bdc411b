"""A run from its recipe to its file: set up, train, validate, preview, save, go on."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.frozen import FrozenFlow, differentiable, usable_bytes
from ..encoder.files import open_student, unused_path, write_student
from ..encoder.teacher import Teacher, TeacherText
from ..runtime.errors import StudentFileError
from ..runtime.ranks import Ranks
from ..runtime.stop import StopRequest
from ..students.t5.trained import DistilledT5
from .batches import Batch, Place, Schedule
from .distill import Learner, linear_schedule, loss_scaler, train_step
from .memory import MemoryNeed
from .models import load_flow, load_teacher_of, make_student_of, memory_need_of, metadata_of
from .objectives import OBJECTIVES
from .optimizer import make_optimizer
from .preview import Previewer, vae_file
from .recipe import Recipe
from .report import Reporter
from .resume import gather_state, restore
from .run_directory import RunDirectory
from .state import STUDENT, Checkpoints
from .teacher_chunks import TeacherChunks
from .trajectory import Position
from .validation import HeldOut, lower

log = logging.getLogger(__name__)


@dataclass
class Workshop:
    """Everything a process of a run works with."""

    recipe: Recipe
    ranks: Ranks
    schedule: Schedule
    flow: FrozenFlow
    teacher: Teacher
    chunks: TeacherChunks
    need: MemoryNeed
    student: DistilledT5
    learner: Learner

    def position(self, batch: Batch, text: TeacherText) -> Position:
        """The start of a batch's trajectory, on the diffusion model's device."""
        device = self.flow.device
        height, width = batch.drawn.noise_BCHW.shape[-2:]
        guidance_B = batch.drawn.guidance_B
        return Position(
            step=0,
            x_BCHW=batch.drawn.noise_BCHW.to(device),
            sigmas_T=self.flow.sigmas(self.recipe.sampling.steps, height, width),
            text_BLD=text.text_BLD.to(device),
            pooled_BP=text.pooled_BP.to(device),
            guidance_B=None if guidance_B is None else guidance_B.to(device),
            token_ids_BL=text.token_ids_BL.to(device),
        )

    def embed(self, token_ids_BL: Tensor) -> Tensor:
        """The student's embeddings [B, L, D] on this process alone: DistributedDataParallel's forward may wait for the others."""
        return replace(self.learner, student=self.student).embed(token_ids_BL)

    def load_flow(self) -> None:
        """Bring the diffusion model to its device with as much room beside it as an optimizer step takes, the host's way."""
        weights = sum(map(Tensor.numel, self.student.parameters()))
        self.flow.load(self.need.room(weights, bool(self.learner.optimizer.state), usable_bytes(self.flow.device)))

    def starts(self, batches: Sequence[Batch], texts: Sequence[TeacherText]) -> list[Position]:
        """The starts of some batches' trajectories, with the diffusion model brought back to its device."""
        self.load_flow()
        return [self.position(batch, text) for batch, text in zip(batches, texts, strict=True)]

    def starts_at(self, place: Place) -> list[Position]:
        """The starts of this process's batches on the trajectory of a place."""
        texts = self.chunks.take(place.stage, place.trajectory)
        return self.starts(self.schedule.batches(place.stage, place.trajectory), texts)


def open_workshop(recipe: Recipe, ranks: Ranks) -> Workshop:
    """Read prompts, load models, make the student. Raises ValueError for whatever does not fit together."""
    schedule = Schedule(recipe, ranks.rank, ranks.world)
    # One that is missing is said now and not at the first preview.
    vae_file(recipe)
    flow = load_flow(recipe)
    teacher = load_teacher_of(recipe, flow)
    student = make_student_of(recipe, flow)
    wrapped = ranks.wrap(student)
    ranks.warm_up(wrapped, torch.zeros(1, 2, dtype=torch.long))
    part = recipe.optimizer
    learner = Learner(
        student=wrapped,
        optimizer=make_optimizer(student, part.learning_rate, (part.beta1, part.beta2), part.weight_decay, part.muon_learning_rate),
        learning_rate=linear_schedule(part.learning_rate, part.warmup_steps, schedule.total_steps),
        max_gradient_norm=part.max_gradient_norm,
        autocast_dtype=torch.bfloat16 if part.autocast == "bf16" else None,
        device=flow.device,
        mean_over_ranks=ranks.mean,
        without_sync=functools.partial(ranks.no_sync, wrapped),
        scaler=loss_scaler(flow),
    )
    chunks = TeacherChunks(teacher, schedule, recipe.teacher.chunk_prompts)
    return Workshop(recipe, ranks, schedule, flow, teacher, chunks, memory_need_of(recipe, flow, teacher), student, learner)


def train(recipe: Recipe, run_path: Path, resume: bool, ranks: Ranks) -> Path | None:
    """Run a recipe to its end; returns the encoder's file, or None when a signal asked to stop (all is saved then).

    Raises ValueError, OSError or NotFinite with a sentence for the person who started it.
    """
    with contextlib.ExitStack() as open_things:
        run = open_things.enter_context(_open_run(recipe, run_path, resume)) if ranks.is_main else None
        stop = open_things.enter_context(StopRequest())
        workshop = open_workshop(recipe, ranks)
        checkpoints = Checkpoints(
            run_path / "checkpoints", functools.partial(_write_checkpointed, recipe, workshop), recipe.checkpoints.keep_last
        )
        # Dropout draws from torch's global generator; each process has its own stretch of it.
        torch.manual_seed(recipe.seed ^ (ranks.rank << 20))
        best, positions = restore(workshop, checkpoints) if resume else (None, [])
        reporter = open_things.enter_context(Reporter(run, ranks.is_main, workshop.schedule.total_steps, start_step=workshop.learner.step))
        open_things.enter_context(differentiable(workshop.flow.model.diffusion_model, recipe.diffusion_model.checkpoint_blocks))
        was_finished = workshop.learner.step >= workshop.schedule.total_steps
        finished = _loop(workshop, checkpoints, reporter, stop, best, positions)
        if not (finished and ranks.is_main):
            return None
        return (written_before(recipe, checkpoints) if was_finished else None) or _finish(workshop, recipe)


def _open_run(recipe: Recipe, path: Path, resume: bool) -> RunDirectory:
    run = RunDirectory(path)
    if not resume:
        return run.start(recipe.to_toml())
    from .recipe import load_recipe

    run.resume()
    run.refuse_other_recipe(load_recipe(str(run.recipe)).differences(recipe))
    return run


def _loop(
    workshop: Workshop, checkpoints: Checkpoints, reporter: Reporter, stop: StopRequest, best: float | None, positions: list[Position]
) -> bool:
    """Train from the learner's step to the last one; whether the last one was reached."""
    recipe, learner, total = workshop.recipe, workshop.learner, workshop.schedule.total_steps
    held_out, previewer = HeldOut(workshop), Previewer(workshop)
    while learner.step < total:
        place = workshop.schedule.place(learner.step)
        if place.step == 0:
            positions = workshop.starts_at(place)
        objective = OBJECTIVES[recipe.stages[place.stage].objective]
        report, positions = train_step(positions, workshop.flow, learner, objective)
        samples = recipe.stages[place.stage].batch * recipe.stages[place.stage].accumulate
        reporter.step(
            learner.step,
            report.loss,
            samples,
            sigma=report.sigma,
            gradient_norm=report.gradient_norm,
            learning_rate=report.learning_rate,
            stage=place.stage,
            skipped_steps=learner.skipped,
        )
        if _due(learner.step, recipe.validation.every_steps, total):
            by_band, count = held_out.loss()
            reached = reporter.held_out(by_band, count)
            best = lower(best, reached)
        if _due(learner.step, recipe.preview.every_steps, total):
            previewer.show(reporter)
        stopping = workshop.ranks.any_of(stop.requested)
        if stopping or learner.lost or _due(learner.step, recipe.checkpoints.every_steps, total):
            _save(workshop, checkpoints, reporter, best, positions)
        learner.check_not_lost()
        if stopping:
            return False
    return True


def _due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def _save(workshop: Workshop, checkpoints: Checkpoints, reporter: Reporter, best: float | None, positions: list[Position]) -> None:
    state = gather_state(workshop, best, positions)
    if state is not None:
        reporter.saved(checkpoints.save(state))


def _write_checkpointed(recipe: Recipe, workshop: Workshop, path: Path, tensors: Any) -> None:
    write_student(path, tensors, metadata_of(recipe, workshop.learner.step))


def written_before(recipe: Recipe, checkpoints: Checkpoints) -> Path | None:
    """The encoder that a finished run has written already: the file under its name that holds the last checkpoint's weights."""
    last = open_student(checkpoints.paths()[-1] / STUDENT).metadata.sha256
    for path in sorted(_encoders().glob(f"{recipe.output.name}*.safetensors")):
        with contextlib.suppress(StudentFileError):
            if last is not None and open_student(path).metadata.sha256 == last:
                log.info("The run is finished, and its encoder is there: nothing was done.")
                return path
    return None


def _encoders() -> Path:
    import folder_paths

    return Path(folder_paths.get_folder_paths("text_encoders")[0])


def _finish(workshop: Workshop, recipe: Recipe) -> Path:
    """Write the encoder where ComfyUI's loader finds it; an older file of that name stays."""
    folder = _encoders()
    folder.mkdir(parents=True, exist_ok=True)
    path = unused_path(folder / f"{recipe.output.name}.safetensors")
    return write_student(path, workshop.student.tensors(), metadata_of(recipe, workshop.learner.step))
