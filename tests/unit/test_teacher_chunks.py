"""Which trajectories the teacher encodes together."""

from __future__ import annotations

import pytest
from distilled_t5.train.batches import Schedule
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.teacher_chunks import chunk_of


@pytest.mark.parametrize(
    ("trajectory", "prompts", "chunk_prompts", "chunk"),
    [
        (0, 4, 8, range(2)),
        (1, 4, 8, range(2)),
        (2, 4, 8, range(2, 4)),
        (6, 4, 8, range(6, 7)),
        (3, 4, 11, range(2, 4)),
        (3, 4, 4, range(3, 4)),
        (3, 4, 3, range(3, 4)),
        (3, 4, 1000, range(7)),
    ],
    ids=["first", "second", "next", "end of the stage", "part of a trajectory left over", "one", "fewer than one", "more than a stage"],
)
def test_a_chunk_has_as_many_trajectories_as_its_prompts_allow_and_at_least_one(trajectory, prompts, chunk_prompts, chunk):
    assert chunk_of(trajectory, prompts, chunk_prompts, trajectories=7) == chunk


def test_every_trajectory_of_a_chunk_has_the_same_borders():
    chunks = [chunk_of(trajectory, 3, 10, 100) for trajectory in range(100)]
    assert all(trajectory in chunk and chunk == chunks[chunk.start] for trajectory, chunk in enumerate(chunks))


def test_a_process_counts_its_own_prompts_and_the_trajectory_that_a_stage_cuts_short():
    settings = ["sampling.steps=4", "stage.0.steps=9", "stage.0.batch=3", "stage.0.accumulate=4", "stage.1.accumulate=4"]
    recipe = load_recipe("smoke", settings)
    assert [Schedule(recipe, 0, ranks).prompts_per_trajectory(0) for ranks in (1, 2, 4)] == [12, 6, 3]
    schedule = Schedule(recipe, 1, 2)
    assert sum(len(batch.prompts) for batch in schedule.batches(0, 0)) == 6
    assert schedule.trajectories(0) == 3
    assert schedule.place(8).trajectory == 2


def test_a_stage_may_have_trajectories_of_its_own_length():
    settings = ["stage.0.steps=6", "stage.1.steps=6", "sampling.steps=4"]
    same, own = (Schedule(load_recipe("smoke", [*settings, *more])) for more in ([], ["stage.0.trajectory_steps=1"]))
    assert [(place.trajectory, place.step) for place in map(own.place, range(6))] == [(number, 0) for number in range(6)]
    assert [place.trajectory for place in map(same.place, range(6))] == [0, 0, 0, 0, 1, 1]
    assert (own.trajectories(0), same.trajectories(0)) == (6, 2)
    # Another stage's batches and places stay as they are.
    assert [own.place(step) for step in range(6, 12)] == [same.place(step) for step in range(6, 12)]
    assert own.batches(1, 0)[0].prompts == same.batches(1, 0)[0].prompts
