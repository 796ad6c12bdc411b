"""Collect the state of a run from its processes, and put it back into the processes of a resumed run."""

# B batch, C H W latent

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..runtime.randomness import RandomStream, random_states, restore_random_states
from .distill import SKIPS_IN_A_ROW
from .run_directory import ANOTHER
from .state import Checkpoints, TrainerState, align
from .trajectory import Position
from .workshop import RunState, Workshop

log = logging.getLogger(__name__)
# The parts of a state that differ between processes.
OWN = ("rng", "position")


def gather_state(workshop: Workshop, best: float | None, positions: Sequence[Position]) -> TrainerState | None:
    """The state of a student's run on the main process, None on the others; all processes must call it.

    Raises NotFinite if a weight of the student is not finite.
    """
    learner, ranks = workshop.learner, workshop.ranks
    learner.check_weights()
    rng = ranks.gather(learner.random.states if learner.random else random_states({}))
    latents = ranks.gather([position.x.cpu() for position in positions])
    if not ranks.is_main:
        return None
    return TrainerState(
        step=learner.step,
        skipped_steps=learner.skipped,
        student=workshop.student.tensors(),
        optimizer=learner.optimizer.state_dict(),
        schedule={"skipped_in_a_row": learner.skipped_in_a_row, "scaler": learner.scaler.state_dict()},
        rng={str(rank): states for rank, states in enumerate(rng)},
        recipe_sha256=workshop.recipe.sha256,
        best=best,
        inputs=workshop.inputs,
        position={str(rank): {str(number): x for number, x in enumerate(xs)} for rank, xs in enumerate(latents)},
    )


def restore(workshop: Workshop, checkpoints: Sequence[Checkpoints], earlier: Sequence[Set[str]] = ()) -> RunState:
    """Load the newest checkpoint that all students have intact into every process.

    `earlier`: for each student, digests of recipes that its run had before its stages were lengthened or shortened.
    Raises ValueError if one was saved with another recipe or another number of processes.
    """
    if workshop.ranks.is_main:
        for note in align(checkpoints):
            log.warning(note)
    triples = zip(workshop.all, checkpoints, earlier or [frozenset()] * len(checkpoints), strict=True)
    restored = [_restore(*each) for each in triples]
    # All walk the same trajectory.
    return RunState([best for best, _ in restored], _positions(workshop, restored[0][1]))


def _restore(workshop: Workshop, checkpoints: Checkpoints, earlier: Set[str]) -> tuple[float | None, Mapping[str, Tensor]]:
    """Put a student's state back; its lowest held-out loss, and this process's latents."""
    ranks = workshop.ranks
    state, notes = checkpoints.load_latest() if ranks.is_main else (None, [])
    for note in notes:
        log.warning(note)
    known = {workshop.recipe.sha256, *earlier}
    _check_same_run(workshop, *ranks.share((state.recipe_sha256 in known, len(state.rng)) if state else (True, 0)))
    common = ranks.share({name: part for name, part in vars(state).items() if name not in OWN} if state else {})
    rng, latents = ranks.scatter(_own_parts(state, ranks.world) if state else None)
    _put_back(workshop, common)
    for note in restore_random_states(rng, {}):
        log.warning(note)
    if workshop.learner.random is not None:
        workshop.learner.random = RandomStream()
    return common["best"], latents


def _check_same_run(workshop: Workshop, same_recipe: bool, processes: int) -> None:
    if not same_recipe:
        raise ValueError(
            "The checkpoint was saved with another recipe than the run's present recipe.toml, or by another version of the trainer.\n"
            "What to do: restore recipe.toml or the earlier version of the pack, or, for a new run, "
            f"{ANOTHER}."
        )
    if processes != workshop.ranks.world:
        raise ValueError(
            f"This run was saved by {processes} processes and is resumed with {workshop.ranks.world}.\n"
            f"What to do: resume it with --nproc-per-node {processes}, or, for a new run, {ANOTHER}."
        )


def _own_parts(state: TrainerState, processes: int) -> list[tuple[Any, Any]]:
    return [(state.rng[str(rank)], state.position[str(rank)]) for rank in range(processes)]


def _put_back(workshop: Workshop, common: Mapping[str, Any]) -> None:
    learner, schedule = workshop.learner, common["schedule"]
    workshop.student.load_tensors(common["student"])
    learner.optimizer.load_state_dict(common["optimizer"])
    learner.step, learner.skipped = common["step"], common["skipped_steps"]
    # A run that stopped because of dropped steps may try again.
    in_a_row = schedule["skipped_in_a_row"]
    learner.skipped_in_a_row = in_a_row if in_a_row < SKIPS_IN_A_ROW else 0
    # Empty if the diffusion model did not compute in fp16 when the run was saved; older checkpoints lack it.
    scaler = schedule.get("scaler")
    if scaler:
        learner.scaler.load_state_dict(scaler)


def _positions(workshop: Workshop, latents: Mapping[str, Tensor]) -> list[Position]:
    step = workshop.learner.step
    place = workshop.schedule.place(step) if step < workshop.schedule.total_steps else None
    if place is None or place.step == 0:
        return []
    starts = workshop.starts_at(place)
    return [replace(start, step=place.step, x=latents[str(number)].to(start.x)) for number, start in enumerate(starts)]
