"""A run from its recipe to its encoder file: set up, train, validate, preview, save, resume."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..encoder.files import open_student, write_student
from ..runtime.errors import StudentFileError
from ..runtime.ranks import Ranks
from ..runtime.stop import Stopped, StopRequest
from .banner import facts_of
from .batches import Place
from .boards import Board
from .cache_plan import wanted
from .card import write_card
from .checkpoint_files import STUDENT, checkpoint_paths, peek, step_of
from .curves import ONE_BAND, Curves
from .distill import StepReport, train_step
from .lengths import change_of_lengths, differences_besides_lengths
from .models import metadata_of
from .optimizer import restart
from .page import starting
from .preview import Previewer
from .recipe import Recipe, load_recipe
from .report import Reporter
from .resume import gather_state, restore
from .run_directory import RunDirectory
from .state import Checkpoints, recorded_inputs, resumed_step
from .trial import trials
from .validation import HeldOut, lower
from .workshop import RunState, Workshop, open_workshop

log = logging.getLogger(__name__)


class Stop(Protocol):
    """Whether the loop should save and stop after this step."""

    @property
    def requested(self) -> bool: ...


def train(
    recipe: Recipe, run_path: Path, resume: bool, ranks: Ranks, stop: Stop | None = None, boards: Sequence[Board] = ()
) -> Path | None:
    """Run a recipe to its end; returns the encoder's file, or None after a request to stop (everything is saved then).

    Without `stop`, signals are the request: that needs the main thread. `boards` receive every number and image.
    Raises ValueError, OSError or NotFinite with a message for the user.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Stopped))
        run = stack.enter_context(_open_run(recipe, run_path, resume)) if ranks.is_main else None
        change = _change_of(run, recipe) if run and resume else []
        stopping = stop or stack.enter_context(StopRequest())
        recorded = recorded_inputs(run_path / "checkpoints") if resume and ranks.is_main else None
        with starting(run) if run else contextlib.nullcontext():
            begin = ranks.share(resumed_step(run_path / "checkpoints") if resume and ranks.is_main else 0) if recipe.teacher.cache else 0
            texts = functools.partial(wanted, step=begin)
            workshop = open_workshop(recipe, ranks, recorded, lambda: stopping.requested, texts)
            write = functools.partial(_write_checkpointed, workshop)
            checkpoints = Checkpoints(run_path / "checkpoints", write, recipe.checkpoints.keep_last)
            # Dropout draws from torch's global generator; each process gets a seed of its own.
            torch.manual_seed(recipe.seed ^ (ranks.rank << 20))
            changes = [*run.recipe_changes(), *change] if run else []
            state = restore(workshop, checkpoints, {one["recipe_sha256_before"] for one in changes}) if resume else RunState()
            if run and not recipe.needs_diffusion_model and state.best is not None and ONE_BAND not in Curves.of(run.metrics).held_out:
                log.warning("The held-out loss was the velocity gap; it is the last stage's objective now. Earlier steps no longer count.")
                state.best = None
            if run and change:
                run.change_recipe(recipe.to_toml(), changes)
            learner, total = workshop.learner, workshop.schedule.total_steps
            reporter = stack.enter_context(Reporter(run, recipe, learner.step, boards))
        stack.enter_context(workshop.model.differentiable(recipe.diffusion_model.checkpoint_blocks))
        if recorded == {}:
            log.warning(
                "The checkpoint was saved by an older version: prompts and model files cannot be compared with those of the run's start."
            )
        for one in changes:
            log.info("At step %d the recipe was changed: %s.", one["step"], ", ".join(one["changes"]))
        was_finished = learner.step >= total
        finished = _loop(workshop, checkpoints, reporter, stopping, state)
        if not (finished and ranks.is_main):
            return None
        written = written_before(recipe, checkpoints.paths()[-1]) if was_finished else None
        return written or _finish(workshop, run)
    return None


def _open_run(recipe: Recipe, path: Path, resume: bool) -> RunDirectory:
    run = RunDirectory(path)
    return run.resume() if resume else run.start(recipe.to_toml())


def _change_of(run: RunDirectory, recipe: Recipe) -> list[dict[str, Any]]:
    """The note of the change to a resumed run's stages, if this recipe changes any. Raises RunError for any other change."""
    present = load_recipe(str(run.recipe))
    run.refuse_other_recipe(differences_besides_lengths(present, recipe))
    saved = [checkpoint for checkpoint in checkpoint_paths(run.checkpoints) if peek(checkpoint)]
    step = step_of(saved[-1]) if saved else 0
    return [] if present.sha256 == recipe.sha256 else [change_of_lengths(present, recipe, step)]


def _loop(workshop: Workshop, checkpoints: Checkpoints, reporter: Reporter, stop: Stop, state: RunState) -> bool:
    """Train from the learner's step to the last one; returns whether the last one was reached."""
    recipe, learner, total = workshop.recipe, workshop.learner, workshop.schedule.total_steps
    held_out, previewer = HeldOut(workshop), Previewer(workshop)
    reporter.begin(facts_of(workshop, reporter.run), trials(workshop))
    while learner.step < total:
        place = workshop.schedule.place(learner.step)
        if place.step == 0:
            if place.trajectory == 0 and recipe.optimizer.restart_per_stage:
                restart(learner.optimizer)
            state.positions = workshop.starts_at(place)
        report, state.positions = train_step(state.positions, workshop.model, learner, workshop.objective(place.stage))
        _report_step(workshop, reporter, place, report)
        if _due(learner.step, recipe.validation.every_steps, total):
            state.best = lower(state.best, reporter.held_out(*held_out.loss()))
        if _due(learner.step, recipe.preview.every_steps, total):
            previewer.show(reporter)
        stopping = workshop.ranks.any_of(stop.requested)
        if stopping or learner.lost or _due(learner.step, recipe.checkpoints.every_steps, total):
            _save(workshop, checkpoints, reporter, state)
        learner.check_not_lost()
        if stopping:
            return False
    return True


def _report_step(workshop: Workshop, reporter: Reporter, place: Place, report: StepReport) -> None:
    stage, learner = workshop.recipe.stages[place.stage], workshop.learner
    numbers = {"sigma": report.sigma, "gradient_norm": report.gradient_norm, "learning_rate": report.learning_rate}
    reporter.step(learner.step, report.loss, stage.batch * stage.accumulate, **numbers, stage=place.stage, skipped_steps=learner.skipped)


def _due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def _save(workshop: Workshop, checkpoints: Checkpoints, reporter: Reporter, state: RunState) -> None:
    gathered = gather_state(workshop, state)
    if gathered is not None:
        reporter.saved(checkpoints.save(gathered))


def _write_checkpointed(workshop: Workshop, path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_student(path, dict(tensors), metadata_of(workshop.recipe, workshop.learner.step))


def written_before(recipe: Recipe, checkpoint: Path) -> Path | None:
    """The encoder that a finished run has already written: the file under its name that holds the last checkpoint's weights."""
    last = open_student(checkpoint / STUDENT).metadata.sha256
    for path in sorted(_encoders().glob(f"{recipe.output.name}*.safetensors")):
        with contextlib.suppress(StudentFileError):
            if last is not None and open_student(path).metadata.sha256 == last:
                log.info("The run is finished and its encoder exists: nothing to do.")
                return path
    return None


def _encoders() -> Path:
    import folder_paths

    return Path(folder_paths.get_folder_paths("text_encoders")[0])


def _finish(workshop: Workshop, run: RunDirectory | None) -> Path:
    """Write the encoder, then the model card, without which a run is finished too."""
    assert run is not None, "the main process has the run directory"
    path = _write_encoder(workshop)
    try:
        log.info("Model card: %s", write_card(run))
    except (OSError, ValueError) as error:
        log.warning("The model card could not be written; `train card` does that later. %s", error)
    return path


def _write_encoder(workshop: Workshop) -> Path:
    """Write the encoder where ComfyUI's loader finds it; an older file of that name is kept."""
    folder, recipe = _encoders(), workshop.recipe
    folder.mkdir(parents=True, exist_ok=True)
    path, metadata = folder / f"{recipe.output.name}.safetensors", metadata_of(recipe, workshop.learner.step)
    return write_student(path, workshop.student.tensors(), metadata, overwrite=False)
