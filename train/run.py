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
from ..runtime.randomness import RandomStream
from ..runtime.ranks import Ranks
from ..runtime.stop import Stopped, StopRequest
from .boards import Board
from .cache_plan import wanted
from .card import write_card
from .checkpoint_files import STUDENT, checkpoint_paths, peek, step_of
from .curves import ONE_BAND, Curves
from .distill import train_step
from .lengths import change_of_lengths, differences_besides_lengths
from .models import metadata_of
from .optimizer import restart
from .page import starting
from .preview import Previewer
from .recipe import Recipe, load_recipe
from .reports import Reports
from .resume import gather_state, restore
from .run_directory import RunDirectory, student_folder
from .state import Checkpoints, recorded_inputs, resumed_step
from .validation import HeldOut, lower
from .workshop import RunState, Workshop, open_workshop

log = logging.getLogger(__name__)


class Stop(Protocol):
    """Whether the loop should save and stop after this step."""

    @property
    def requested(self) -> bool: ...


def train(
    recipe: Recipe, run_path: Path, resume: bool, ranks: Ranks, stop: Stop | None = None, boards: Sequence[Board] = ()
) -> list[Path] | None:
    """Run a recipe to its end; returns each student's file, or None after a request to stop (everything is saved then).

    Without `stop`, signals are the request: that needs the main thread. `boards` receive every number and image.
    Raises ValueError, OSError or NotFinite with a message for the user.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(Stopped))
        own = [student_folder(run_path, name) for name in recipe.student_names]
        # A student of several has a run of its own in the run, as if it were trained alone.
        recipes = {run_path: recipe} | dict(zip(own, recipe.each, strict=True))
        runs = [stack.enter_context(_open_run(one, path, resume)) for path, one in recipes.items()] if ranks.is_main else []
        changes = _changes_of(runs, [*recipes.values()] if runs else [], own[0]) if resume else [[] for _ in runs]
        stopping = stop or stack.enter_context(StopRequest())
        recorded = [recorded_inputs(path / "checkpoints") for path in own] if resume and ranks.is_main else []
        with contextlib.ExitStack() as starts:
            for run in runs:
                starts.enter_context(starting(run))
            # In the cache of a resumed run, texts of stages that are over are not wanted.
            cached = recipe.teacher.cache and resume and ranks.is_main
            begin = ranks.share(resumed_step([path / "checkpoints" for path in own]) if cached else 0)
            texts = functools.partial(wanted, step=begin)
            workshop = open_workshop(recipe, ranks, recorded, lambda: stopping.requested, texts)
            # The newest checkpoint of a student is kept until those of all are written.
            kept = recipe.checkpoints.keep_last + (len(own) > 1)
            stores = [_checkpoints(one, path, kept) for one, path in zip(workshop.all, own, strict=True)]
            _seed(workshop)
            state = _restored(workshop, stores, runs[-len(own) :], changes[-len(own) :]) if resume else RunState([None] * len(own))
            for run, one, notes in zip(runs, recipes.values(), changes, strict=False):
                if len(notes) > len(run.recipe_changes()):
                    run.change_recipe(one.to_toml(), notes)
            reports = Reports.open(runs or [None] * len(recipes), recipe, workshop.learner.step, boards, stack)
        stack.enter_context(workshop.model.differentiable(recipe.diffusion_model.checkpoint_blocks))
        if {} in recorded:
            log.warning(
                "The checkpoint was saved by an older version: prompts and model files cannot be compared with those of the run's start."
            )
        for change in changes[0] if changes else ():
            log.info("At step %d the recipe was changed: %s.", change["step"], ", ".join(change["changes"]))
        was_finished = workshop.learner.step >= workshop.schedule.total_steps
        finished = _loop(workshop, stores, reports, stopping, state)
        if not (finished and ranks.is_main):
            return None
        return [
            (written_before(one.recipe, store.paths()[-1]) if was_finished else None) or _finish(one, run)
            for one, store, run in zip(workshop.all, stores, runs[-len(own) :], strict=True)
        ]
    return None


def _restored(
    workshop: Workshop, stores: Sequence[Checkpoints], runs: Sequence[RunDirectory], changes: Sequence[Sequence[Mapping[str, Any]]]
) -> RunState:
    """The state in which a run goes on; runs, changes: the students' directories and changes of their recipes, on the main process."""
    state = restore(workshop, stores, [{change["recipe_sha256_before"] for change in one} for one in changes])
    if runs and not workshop.recipe.needs_diffusion_model:
        state.best = [_comparable(best, run) for best, run in zip(state.best, runs, strict=True)]
    return state


def _seed(workshop: Workshop) -> None:
    # Dropout draws from torch's global generator; each process gets a seed of its own.
    torch.manual_seed(workshop.recipe.seed ^ (workshop.ranks.rank << 20))
    for learner in workshop.learners:
        learner.random = RandomStream() if learner.name else None


def _open_run(recipe: Recipe, path: Path, resume: bool) -> RunDirectory:
    """Raises RunError for a run of another recipe, before the folders of its students are looked for."""
    run = RunDirectory(path)
    if resume and run.is_run:
        run.refuse_other_recipe(differences_besides_lengths(load_recipe(str(run.recipe)), recipe))
    return run.resume() if resume else run.start(recipe.to_toml())


def _changes_of(runs: Sequence[RunDirectory], recipes: Sequence[Recipe], first: Path) -> list[list[dict[str, Any]]]:
    """For each run, the notes of the changes to its stages, with that which this recipe makes. Raises RunError for an impossible one.

    `first`: the folder that has the first student's checkpoints.
    """
    saved = [checkpoint for checkpoint in checkpoint_paths(first / "checkpoints") if peek(checkpoint)]
    return [
        [*run.recipe_changes(), *_change_of(run, one, step_of(saved[-1]) if saved else 0)] for run, one in zip(runs, recipes, strict=True)
    ]


def _change_of(run: RunDirectory, recipe: Recipe, step: int) -> list[dict[str, Any]]:
    present = load_recipe(str(run.recipe))
    return [] if present.sha256 == recipe.sha256 else [change_of_lengths(present, recipe, step)]


def _comparable(best: float | None, run: RunDirectory) -> float | None:
    """The lowest held-out loss of a run that only imitates, if it was measured as it is now."""
    if best is None or ONE_BAND in Curves.of(run.metrics).held_out:
        return best
    log.warning("The held-out loss was the velocity gap; it is the last stage's objective now. Earlier steps no longer count.")
    return None


def _checkpoints(workshop: Workshop, path: Path, kept: int) -> Checkpoints:
    return Checkpoints(path / "checkpoints", functools.partial(_write_checkpointed, workshop), kept)


def _loop(workshop: Workshop, stores: Sequence[Checkpoints], reports: Reports, stop: Stop, state: RunState) -> bool:
    """Train from the learners' step to the last one; returns whether the last one was reached."""
    recipe, learners, total = workshop.recipe, workshop.learners, workshop.schedule.total_steps
    held_out, previewer = HeldOut(workshop), Previewer(workshop)
    reports.begin(workshop)
    while workshop.learner.step < total:
        place = workshop.schedule.place(workshop.learner.step)
        if place.step == 0:
            if place.trajectory == 0 and recipe.optimizer.restart_per_stage:
                for learner in learners:
                    restart(learner.optimizer)
            state.positions = workshop.starts_at(place)
        steps, state.positions = train_step(state.positions, workshop.model, learners, workshop.objective(place.stage))
        reports.step(workshop, place, steps)
        step = workshop.learner.step
        if _due(step, recipe.validation.every_steps, total):
            state.best = list(map(lower, state.best, reports.held_out(*held_out.losses())))
        if _due(step, recipe.preview.every_steps, total):
            previewer.show(reports)
        stopping = workshop.ranks.any_of(stop.requested)
        if stopping or any(learner.lost for learner in learners) or _due(step, recipe.checkpoints.every_steps, total):
            _save(workshop, stores, reports, state)
        for learner in learners:
            learner.check_not_lost()
        if stopping:
            return False
    return True


def _due(step: int, every: int, total: int) -> bool:
    return step % every == 0 or step == total


def _save(workshop: Workshop, stores: Sequence[Checkpoints], reports: Reports, state: RunState) -> None:
    saved = []
    for one, store, best in zip(workshop.all, stores, state.best, strict=True):
        gathered = gather_state(one, best, state.positions)
        if gathered is not None:
            saved.append(store.save(gathered))
    if saved:
        reports.saved(saved)


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


def _finish(workshop: Workshop, run: RunDirectory) -> Path:
    """Write the encoder, then the model card, without which a run is finished too."""
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
